"""Whole runs of MAGI-1's sampler against upstream's (tests/golden/README.md says how the tensors were made)."""

from dataclasses import replace

import pytest
import torch

from flowcache_core.engine.loop import Cancelled, Engine
from flowcache_core.errors import UserError
from flowcache_core.history.cache import History
from flowcache_core.models.families import family_preset
from flowcache_core.models.magi.config import MAGI_4_5B
from flowcache_core.models.magi.forward import (
    PUBLISHED_FLOWCACHE,
    MagiSampling,
    clean_chunks_seen,
    magi_plan,
    magi_schedule,
    magi_settings,
)
from flowcache_core.models.magi.text import caption_text
from flowcache_core.settings import HELD, OFF, Compression, Drift, Fixed, HistorySettings, Settings
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_runs import BASE, FRAMES, HEIGHT, RUNS, WIDTH, given_of, magi_run, tokens
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden
from tests.helpers.runs import video

GOLDEN = golden("magi_runs")
FLOWCACHE = golden("magi_flowcache")


def trace(run: Engine) -> torch.Tensor:
    """Latents of the active chunks after every tick, end to end, [1, C, T, H, W]."""
    ticks: list[torch.Tensor] = []
    run.on_progress = lambda told: ticks.extend(chunk.latent for chunk in run.advanced)
    list(run.run())
    return torch.cat(ticks, dim=2)


@pytest.mark.parametrize("name", [name for name in RUNS if f"{name}.latents" in GOLDEN])
def test_every_steps_latent(name):
    assert relative_error(trace(magi_run(name)), GOLDEN[f"{name}.latents"]) < 1e-4


def published(threshold: float, budget: int | None = None, weight: float = 0.07) -> Settings:
    """The reference FlowCache's settings of the golden runs."""
    history = HistorySettings(budget, Compression(weight=weight))
    return Settings(Drift(threshold, warmup=3), HELD, history, clean_pass=False)


@pytest.mark.parametrize(
    ("name", "threshold", "budget"), [("reuse", 0.05, None), ("compressed", 0.02, 1), ("last", 0.12, None)]
)
def test_published_flowcache(name, threshold, budget, monkeypatch):
    run = magi_run(name, published(threshold, budget), PUBLISHED_FLOWCACHE)
    kept, cut = [], History._cut_stored

    def watched(history) -> None:
        cut(history)
        kept.append(history.tokens[:, 0, :, : history.clean].clone())

    monkeypatch.setattr(History, "_cut_stored", watched)
    latents = trace(run)
    decisions = FLOWCACHE[f"{name}.decisions"]
    for chunk in range(decisions.shape[1]):
        taken = [bool(decision) for decision in decisions[:, chunk] if decision >= 0]
        assert run.report.decisions["text"][chunk] == taken
    assert (decisions == 0).sum() > 20 and (decisions == 1).sum() > 3
    if budget is not None:
        assert torch.equal(torch.stack(kept), FLOWCACHE[f"{name}.kept"].int())
    assert relative_error(latents, FLOWCACHE[f"{name}.latents"]) < 1e-4


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        (published(0.02, 1), replace(PUBLISHED_FLOWCACHE, held="velocity")),
        (published(0.02, 2), PUBLISHED_FLOWCACHE),
        (published(0.02, 1, weight=1.0), PUBLISHED_FLOWCACHE),
        (published(0.022, 1), PUBLISHED_FLOWCACHE),
    ],
)
def test_another_flowcache_is_noticed(settings, sampling):
    assert relative_error(trace(magi_run("compressed", settings, sampling)), FLOWCACHE["compressed.latents"]) > 1e-3


@pytest.mark.parametrize("name", ["base", "image", "distill"])
def test_bfloat16_is_near_the_float32_golden(name):
    assert relative_error(trace(magi_run(name, dtype=torch.bfloat16)), GOLDEN[f"{name}.latents"]) < 2e-2


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("base", MagiSampling(visible=())),
        ("base", MagiSampling(visible=(5, 4, 3, 3))),
        ("distill", MagiSampling(near_clean=False)),
        ("distill", MagiSampling(order="16,16,8")),
    ],
)
def test_wrong_sampling_is_noticed(name, sampling):
    assert relative_error(trace(magi_run(name, sampling=sampling)), GOLDEN[f"{name}.latents"]) > 1e-3


@pytest.mark.parametrize("name", ["base", "distill"])
def test_a_missing_clean_pass_is_noticed(name):
    assert relative_error(trace(magi_run(name, replace(OFF, clean_pass=False))), GOLDEN[f"{name}.latents"]) > 1e-3


def test_a_wrong_duration_is_noticed():
    caption = normal("caption", (1, 1, BASE.caption_tokens, BASE.caption_width))[0]
    mask = (torch.arange(BASE.caption_tokens) < 9)[None]
    text = caption_text(caption, mask, tokens(BASE.caption_width), 0)
    assert relative_error(trace(magi_run("image", text=lambda chunk: text)), GOLDEN["image.latents"]) > 1e-3


def test_chunks_that_no_one_sees_are_dropped_without_effect():
    runs = []
    for settings in (OFF, replace(OFF, history=HistorySettings(10, Compression("window")))):
        run = magi_run("long", settings)
        runs.append(trace(run))
    assert torch.equal(*runs)
    dropping = magi_run("long")
    list(dropping.run())
    assert (dropping.forward.plan.clean_chunks, dropping.forward.plan.slots) == (1, 5)
    assert dropping.report.history_bytes_allocated < run.report.history_bytes_allocated


@pytest.mark.parametrize("name", ["image", "distill_video"])
def test_going_on_from_a_state_equals_going_on_from_the_frames(name):
    first, given = magi_run(name), given_of(name)
    latents = video(first)
    if first.schedule.prefix:
        latents = torch.cat([given[:, :, : first.schedule.prefix * FRAMES], latents], dim=2)
    whole = latents.shape[2] // FRAMES
    latents = torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)  # pasted in anew for a clean pass
    (clean,) = first.save().values()

    def go_on(**more) -> torch.Tensor:
        schedule = magi_schedule(2 * FRAMES, first.schedule.steps, latents.shape[2])
        start = lambda chunk: normal(f"noise{chunk}", (1, latents.shape[1], FRAMES, HEIGHT, WIDTH))  # noqa: E731
        return video(magi_run(name, schedule=schedule, start=start, given=latents, **more))

    assert clean.tokens[0, 0, 0, -1] == whole * FRAMES * 6 - 1
    assert go_on(loaded=clean).shape[2] == 2 * FRAMES
    assert relative_error(go_on(loaded=clean), go_on()) < 1e-5


def test_a_prompt_for_each_chunk():
    captions = normal("caption", (1, 1, 800, BASE.caption_width))[0], normal("other", (1, 800, BASE.caption_width))
    mask = (torch.arange(800) < 9)[None]
    special = tokens(BASE.caption_width)

    def latents(change_at: int) -> list[torch.Tensor]:
        text = lambda chunk: caption_text(captions[chunk >= change_at], mask, special, 6 - chunk)  # noqa: E731
        return [chunk.latent for chunk in magi_run("base", text=text).run()]

    same, changed = latents(7), latents(4)
    assert all(torch.equal(a, b) for a, b in zip(same[:4], changed[:4], strict=True))
    assert relative_error(changed[4], same[4]) > 1e-2


def test_forwards_that_weigh_nothing_are_left_out():
    run = magi_run("base")
    chunks = list(run.run())
    decisions = run.report.decisions
    assert len(chunks) == run.report.chunks_done == 7
    steps = {branch: sum(len(taken) for taken in decisions[branch].values()) for branch in decisions}
    assert steps == {"past": 56, "text": 42, "alone": 42}  # from t = 0.3 on, the last quarter, only the past counts


def test_cancelling_and_progress():
    told = []
    run = magi_run("distill", on_progress=told.append, cancelled=lambda: len(told) == 3)
    with pytest.raises(Cancelled, match="0 of 5"):
        list(run.run())
    assert [progress.tick for progress in told] == [1, 2, 3] and told[0].ticks == run.schedule.ticks


def test_reuse_of_a_base_network_recomputes_where_the_guidance_changes():
    run = magi_run("base", Settings(Fixed((0,)), HELD))
    list(run.run())
    assert [step for step, taken in enumerate(run.report.decisions["past"][1]) if taken] == [0, 6]
    assert run.report.decisions["past"][6][-1]  # the run's last step


def test_held_residuals_are_refused():
    with pytest.raises(UserError, match="velocity held"):
        magi_run("base", Settings(Drift(0.1, holds="residual")))


def test_clean_chunks_that_are_seen():
    assert clean_chunks_seen((5, 4, 3, 2), 0) == 1
    assert clean_chunks_seen((5, 4, 3, 2), 3) == 3
    assert clean_chunks_seen((5, 4, 3, 2), 9) == 4
    assert clean_chunks_seen((4,), 0) == 3
    assert clean_chunks_seen((5, 5), 0) == 4


def test_memory_plan_of_the_published_network():
    def gigabytes(seconds: int, settings: Settings, sampling: MagiSampling) -> float:
        schedule = magi_schedule(seconds * 24 // 4, 64)
        settings = magi_settings(settings, sampling, schedule)
        return magi_plan(MAGI_4_5B, schedule, settings, sampling, (1, 16, FRAMES, 90, 90)).history_bytes / 2**30

    everything = replace(OFF, clean_pass=False)
    budget = family_preset("paper slow", "magi", MAGI_4_5B.width, HistorySettings(5))
    assert gigabytes(10, everything, PUBLISHED_FLOWCACHE) == pytest.approx(15.9, abs=0.1)  # 10 chunks of 12,150 tokens
    assert gigabytes(60, everything, PUBLISHED_FLOWCACHE) == pytest.approx(95.3, abs=0.1)
    assert (
        gigabytes(60, budget, PUBLISHED_FLOWCACHE)
        == gigabytes(10, budget, PUBLISHED_FLOWCACHE)
        == pytest.approx(16.7, abs=0.1)
    )
    kept = replace(OFF, history=HistorySettings(5))
    assert gigabytes(60, kept, MagiSampling()) == gigabytes(20, kept, MagiSampling()) == pytest.approx(8.5, abs=0.1)
    assert gigabytes(60, OFF, MagiSampling()) == gigabytes(10, OFF, MagiSampling()) == pytest.approx(1.9, abs=0.1)


def test_a_batch_equals_its_rows():
    def other(latent: torch.Tensor) -> torch.Tensor:
        return latent.flip(-1)

    both = video(magi_run("distill_other_order", rows=2, change=other))
    assert relative_error(both[:1], video(magi_run("distill_other_order"))) < 1e-5
    assert relative_error(both[1:], video(magi_run("distill_other_order", change=other))) < 1e-5


def test_given_frames_that_do_not_fit_the_schedule_are_told():
    with pytest.raises(UserError, match="6 latent frames are given, but the schedule is one for 2"):
        magi_run("video", given=given_of("video")[:, :, :6])
