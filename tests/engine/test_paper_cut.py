"""The paper's presets cut a history as its runs did; a budget that cuts nothing says so."""

import pytest
import torch

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.idle import uncut_notes
from flowcache_core.engine.loop import Engine
from flowcache_core.models.families import family_preset
from flowcache_core.models.presets import PAPER_PRESETS, PRESETS, preset
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import BY_FRAMES, HELD, Compression, Drift, HistorySettings, Settings
from flowcache_core.solvers.noise_levels import skyreels
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.runs import build
from tests.helpers.tiny import TINY, tiny_network

BUDGET = HistorySettings(1, BY_FRAMES)
WINDOW = ChunkSchedule(5, 50, 5)  # SkyReels-V2's 97 frames: every chunk begins before the first is finished


def engine(settings: Settings, schedule: ChunkSchedule = WINDOW) -> Engine:
    words = torch.randn(1, 3, TINY.text_dim, generator=torch.Generator().manual_seed(0))
    return build(
        SkyReelsBackbone(tiny_network(), fps=24), schedule, classifier_free(words), skyreels(schedule.steps),
        lambda chunk: chunk_noise(0, chunk, (1, TINY.in_dim, 2, 4, 4)), settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_the_papers_presets_bring_its_cut(name):
    magi, sky = (family_preset(name, family, 1536, BUDGET).history.compression for family in ("magi", "skyreels"))
    for cut in (magi, sky):
        assert (cut.granularity, cut.weight, cut.queries) == ("token", 0.07, 0)
        assert not cut.protect_first and not cut.protect_newest
    assert (magi.asking, magi.at_once) == ("newest", False)
    assert (sky.asking, sky.at_once) == ("oldest", True)
    assert preset(name, 2).history.compression == magi
    assert preset(name, 2, BY_FRAMES).history.compression == BY_FRAMES  # told otherwise


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PAPER_PRESETS])
def test_others_cut_as_they_are_told(name):
    assert family_preset(name, "skyreels", 1536, BUDGET).history == BUDGET
    assert preset(name, 2).history.compression == BY_FRAMES


def test_a_window_of_skyreels_is_cut_inside():
    made = engine(family_preset("paper slow", "skyreels", 0, BUDGET))
    assert made.report.notes == []
    clean = []
    for _ in made.run():
        clean.append(made.forward.histories["cond"].clean)
    chunk = made.forward.plan.chunk_tokens
    # The first finds room; each of the others is cut when the next forward begins, and the last has none after it.
    assert clean == [chunk, 2 * chunk, 2 * chunk, 2 * chunk, 2 * chunk]
    tokens = made.forward.histories["cond"].tokens[:, :, :, : 2 * chunk]
    assert (tokens.diff(dim=-1) > 0).all()  # in time order, none twice
    assert len({tuple(head.tolist()) for layer in tokens for head in layer[0]}) > 1  # heads choose for themselves


def test_the_oldest_chunk_that_goes_on_asks():
    made = engine(family_preset("paper slow", "skyreels", 0, BUDGET), ChunkSchedule(3, 8, 2))
    asked, attend = [], made.forward._asking

    def asking(steps):
        chosen = attend(steps)
        asked.append(([(step.place.chunk, step.place.step) for step in steps], chosen))
        return chosen

    made.forward._asking = asking
    list(made.run())
    for steps, chosen in asked:
        going = [chunk for chunk, step in steps if step < 7]
        assert chosen == (going or [steps[0][0]])[0]
    assert any(steps[0][1] == 7 and chosen == steps[1][0] for steps, chosen in asked if len(steps) > 1)


@pytest.mark.parametrize(
    ("history", "joint", "words"),
    [
        (HistorySettings(1), False, "when 0 chunks are finished, which the budget of 1 chunks holds"),
        (HistorySettings(5), False, "the budget of 5 chunks holds the whole video of 5 chunks"),
        (HistorySettings(1), True, "with attention joint"),
    ],
)
def test_a_budget_that_cuts_nothing_says_so(history, joint, words):
    settings = Settings(Drift(0.1), HELD, history, clean_pass=False)
    (note,) = uncut_notes(settings, WINDOW, 5, joint, at_once=False)
    assert note.startswith("nothing is cut: ") and words in note
    if not joint:
        made = engine(settings)
        assert note in made.report.notes
        list(made.run())
        assert made.forward.histories["cond"].clean == 5 * made.forward.plan.chunk_tokens


def test_a_budget_that_cuts_says_nothing():
    settings = Settings(Drift(0.1), HELD, HistorySettings(1, Compression()), clean_pass=False)
    assert uncut_notes(settings, ChunkSchedule(12, 50, 5), 5, joint=False, at_once=False) == []
    assert uncut_notes(settings, WINDOW, 5, joint=False, at_once=True) == []
    assert uncut_notes(Settings(), WINDOW, 5, joint=True, at_once=False) == []
