"""Histories that are computed anew where the prompt changes, as LongLive does it (tests/golden/README.md)."""

import pytest
import torch
from torch import Tensor

from flowcache_core.engine.anew import Anew
from flowcache_core.engine.loop import Engine
from flowcache_core.generation import Result, generate
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import Compression, HistorySettings, Settings
from flowcache_core.solvers import noise_levels
from flowcache_core.storage.keeping import KeptChunks
from flowcache_core.storage.run_folder import RunFolder
from flowcache_core.storage.state import State, load_state, save_state
from tests.helpers import golden_weights
from tests.helpers.golden_runs import frames_of, relative_error
from tests.helpers.history_windows import golden_run
from tests.helpers.place import golden
from tests.helpers.runs import video

GOLDEN = golden("longlive")
FRAMES = 3  # of a chunk
NAMES = ("cond", "other", "third")


def window(frames: int, sink: int, **more) -> HistorySettings:
    return HistorySettings(window=frames, compression=Compression("window", sink=sink), **more)


PUBLISHED = Settings(history=window(12, 3))
SHOWN = ["cond", "cond", "other", "other", "other", "third", "third"]  # by chunk
RUNS = {
    "longlive_switch": (SHOWN, window(12, 3), 12),
    "longlive_switch_6": (["cond", "cond", "other", "cond", "cond"], window(6, 1), 6),
    "longlive_switch_infinity": (SHOWN, window(12, 3, relative=True), 12),
}


def make(shown: list[str], history: HistorySettings, anew: Anew | None, lag: int = 4) -> Engine:
    schedule = ChunkSchedule(len(shown), 4, lag)
    return golden_run(schedule, noise_levels.linear(4, 5.0), Settings(history=history), shown, anew=anew)


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    shown, history, frames = RUNS[name]
    expected, engine = GOLDEN[f"{name}.final"], make(shown, history, Anew(frames))
    assert relative_error(video(engine), expected) < 1e-5
    assert engine.report.reruns == 2
    assert relative_error(video(make(shown, history, None)), expected) > 1e-2
    assert relative_error(video(make(shown, history, Anew(frames - 1))), expected) > 1e-3


@pytest.mark.parametrize("more", [{"memory": "system"}, {"type": "int8"}])
def test_wherever_the_history_is(more):
    expected = GOLDEN["longlive_switch.final"]
    found = video(make(SHOWN, window(12, 3, **more), Anew(12)))
    assert relative_error(found, expected) < (1e-2 if "type" in more else 1e-5)


@pytest.mark.parametrize(
    ("history", "kept"),
    [(HistorySettings(), 21), (HistorySettings(budget=3), 12), (HistorySettings(budget=6), 21), (window(18, 3), 18)],
)
def test_another_history_holds_what_it_has_room_for(history, kept):
    """The newest 12 frames are computed anew whatever is held beside them; none of it twice."""
    engine = make(SHOWN, history, Anew(12))
    video(engine)
    (held,) = engine.forward.histories.values()
    frames = held.tokens[:, :, :, : held.clean] // held.plan.frame_tokens
    assert held.clean == kept * held.plan.frame_tokens
    assert (frames.diff() >= 0).all() and frames.max() == 20
    assert engine.report.rerun_for == [2, 5]


def test_chunks_that_overlap_are_told_that_nothing_is_computed_anew():
    engine = make(SHOWN, window(12, 3), Anew(12), lag=2)
    video(engine)
    assert engine.report.reruns == 0
    assert any("not computed anew" in note for note in engine.report.notes)


def run(shown: list[str], state: State | None = None, **more) -> Result:
    return generate(
        WanBackbone(golden_weights.network()),
        [golden_weights.text(name) for name in shown],
        len(shown),
        family_name="longlive",
        settings=PUBLISHED,
        latent_size=(4, 6),
        state=state,
        **more,
    )


@pytest.mark.parametrize("cut", [1, 2, 4, 5, 6])
def test_goes_on_from_a_state_as_if_it_had_not_stopped(cut, tmp_path):
    save_state(run(SHOWN[:cut]).state, tmp_path / "state.safetensors")
    after = run(SHOWN[cut:], load_state(tmp_path / "state.safetensors"))
    assert torch.equal(after.latents, run(SHOWN).latents)


def test_a_state_without_all_latents_is_computed_anew_as_far_as_they_go():
    state = run(SHOWN[:5]).state
    short = state._replace(latents=state.latents[:, :, -3:], dropped=12)
    after = run(SHOWN[5:], short)
    assert any("as far as its latents were there" in note for note in after.report.notes)
    assert not torch.equal(after.latents[:, :, 3:], run(SHOWN).latents[:, :, 15:])


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_resumes_as_if_it_had_not_stopped(cut, tmp_path):
    name = "0" * 32

    def folder() -> RunFolder:
        return RunFolder(tmp_path, name, 2**30, 0, FRAMES)

    run(SHOWN[:cut], keep=KeptChunks(folder()))
    again = folder()
    earlier = again.load(recent=12)
    assert earlier is not None and earlier.chunks == cut
    assert earlier.latents.shape[2] == min(12, cut * FRAMES)
    after = run(SHOWN[cut:], earlier, keep=KeptChunks(again))
    whole = run(SHOWN).latents
    assert torch.equal(after.latents, whole[:, :, -after.latents.shape[2] :])
    last = folder().load()
    assert last is not None and torch.equal(last.latents, whole[:, :, -FRAMES:])


def test_a_prefix_is_shown_the_text_that_it_was_given_with():
    prefix = run(["cond"] * 3).latents
    same, other = run(["cond"] * 2, prefix=prefix), run(["cond", "other"], prefix=prefix)
    assert same.report.reruns == 0
    assert other.report.rerun_for == [4]


def test_a_start_image_is_among_the_frames():
    image: Tensor = frames_of("image", 1)
    result = run(SHOWN, prefix=image)
    assert result.report.rerun_for == [2, 5]
    assert torch.equal(run(SHOWN[3:], run(SHOWN[:3], prefix=image).state).latents, result.latents)
