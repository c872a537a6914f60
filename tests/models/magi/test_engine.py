"""Whole runs of MAGI-1's sampler against upstream's (tests/golden/README.md says how the tensors were made)."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.engine.loop import Cancelled
from flowcache_core.errors import UserError
from flowcache_core.history.cache import History
from flowcache_core.history.compression import Compression
from flowcache_core.history.settings import HistorySettings
from flowcache_core.models.magi.config import MAGI_4_5B
from flowcache_core.models.magi.engine import (
    PUBLISHED_FLOWCACHE,
    MagiEngine,
    MagiSampling,
    clean_chunks_seen,
    history_plan,
    magi_schedule,
)
from flowcache_core.models.magi.network import MagiText
from flowcache_core.models.magi.text import caption_text
from flowcache_core.models.memory import plan_magi_history
from flowcache_core.models.presets import OFF, ReuseSettings, Settings
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_runs import BASE, FRAMES, HEIGHT, RUNS, WIDTH, engine, tokens
from tests.helpers.magi_weights import normal
from tests.helpers.paths import GOLDEN_FOLDER

GOLDEN = load_file(GOLDEN_FOLDER / "magi_runs.safetensors")
FLOWCACHE = load_file(GOLDEN_FOLDER / "magi_flowcache.safetensors")


def trace(run: MagiEngine) -> torch.Tensor:
    """Latents of the active chunks after every tick, end to end, [1, C, T, H, W]."""
    ticks, ready = [], {}
    finish = run._finish

    def keep(chunk):
        ready[chunk] = run._latents[chunk]
        return finish(chunk)

    def after(progress):
        ticks.extend(
            ready.pop(place.chunk) if place.chunk in ready else run._latents[place.chunk] for place in progress.places
        )

    run._finish, run.on_progress = keep, after
    list(run.run())
    return torch.cat(ticks, dim=2)


@pytest.mark.parametrize("name", [name for name in RUNS if f"{name}.latents" in GOLDEN])
def test_every_steps_latent(name):
    assert relative_error(trace(engine(name)), GOLDEN[f"{name}.latents"]) < 1e-4


def published(threshold: float, budget: int | None = None, weight: float = 0.07) -> Settings:
    """The reference FlowCache's settings of the golden runs."""
    reuse = ReuseSettings("flowcache", threshold=threshold, warmup=3, order=0, correct=False)
    return Settings(reuse, HistorySettings(budget, Compression(weight=weight)), clean_pass=False)


@pytest.mark.parametrize(
    ("name", "threshold", "budget"), [("reuse", 0.05, None), ("compressed", 0.02, 1), ("last", 0.12, None)]
)
def test_published_flowcache(name, threshold, budget, monkeypatch):
    run = engine(name, published(threshold, budget), PUBLISHED_FLOWCACHE)
    kept, compress = [], History._compress

    def watched(history, keep):
        compress(history, keep)
        kept.append(history.tokens[:, 0, :, :keep].clone())

    monkeypatch.setattr(History, "_compress", watched)
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
    assert relative_error(trace(engine("compressed", settings, sampling)), FLOWCACHE["compressed.latents"]) > 1e-3


@pytest.mark.parametrize("name", ["base", "image", "distill"])
def test_bfloat16_is_near_the_float32_golden(name):
    assert relative_error(trace(engine(name, dtype=torch.bfloat16)), GOLDEN[f"{name}.latents"]) < 2e-2


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
    assert relative_error(trace(engine(name, sampling=sampling)), GOLDEN[f"{name}.latents"]) > 1e-3


@pytest.mark.parametrize("name", ["base", "distill"])
def test_a_missing_clean_pass_is_noticed(name):
    assert relative_error(trace(engine(name, replace(OFF, clean_pass=False))), GOLDEN[f"{name}.latents"]) > 1e-3


def test_a_wrong_duration_is_noticed():
    caption = normal("caption", (1, 1, BASE.caption_tokens, BASE.caption_width))[0]
    mask = (torch.arange(BASE.caption_tokens) < 9)[None]
    text = caption_text(caption, mask, tokens(BASE.caption_width), 0)
    assert relative_error(trace(engine("image", text=lambda chunk: text)), GOLDEN["image.latents"]) > 1e-3


def test_chunks_that_no_one_sees_are_dropped_without_effect():
    runs = []
    for settings in (OFF, replace(OFF, history=HistorySettings(10, Compression("window")))):
        run = engine("long", settings)
        runs.append(trace(run))
    assert torch.equal(*runs)
    dropping = engine("long")
    list(dropping.run())
    assert dropping.history.shape.capacity == 6
    assert dropping.report.history_bytes_allocated < run.report.history_bytes_allocated


@pytest.mark.parametrize("name", ["image", "distill_video"])
def test_going_on_from_a_state_equals_going_on_from_the_frames(name):
    first = engine(name)
    latents = torch.cat([chunk.latent for chunk in first.run()], dim=2)
    if first.schedule.prefix:
        latents = torch.cat([first.given[:, :, : first.schedule.prefix * FRAMES], latents], dim=2)
    whole = latents.shape[2] // FRAMES
    (clean,) = first.save().values()

    def go_on(given_of: str) -> torch.Tensor:
        run = engine(name)
        run.schedule = magi_schedule(2 * FRAMES, run.schedule.steps, latents.shape[2])
        run.report.schedule = run.schedule
        run.given = first._with_given(0, latents)  # given frames are pasted in anew for a clean pass
        run.start = lambda chunk: normal(f"noise{chunk}", (1, latents.shape[1], FRAMES, HEIGHT, WIDTH))
        if given_of == "state":
            run.load(clean)
        return torch.cat([chunk.latent for chunk in run.run()], dim=2)

    assert clean.tokens[0, 0, 0, -1] == whole * FRAMES * 6 - 1
    assert go_on("state").shape[2] == 2 * FRAMES
    assert relative_error(go_on("state"), go_on("frames")) < 1e-5


def test_a_prompt_for_each_chunk():
    captions = normal("caption", (1, 1, 800, BASE.caption_width))[0], normal("other", (1, 800, BASE.caption_width))
    mask = (torch.arange(800) < 9)[None]
    special = tokens(BASE.caption_width)

    def latents(change_at: int) -> list[torch.Tensor]:
        text = lambda chunk: caption_text(captions[chunk >= change_at], mask, special, 6 - chunk)  # noqa: E731
        return [chunk.latent for chunk in engine("base", text=text).run()]

    same, changed = latents(7), latents(4)
    assert all(torch.equal(a, b) for a, b in zip(same[:4], changed[:4], strict=True))
    assert relative_error(changed[4], same[4]) > 1e-2


def test_forwards_that_weigh_nothing_are_left_out():
    run = engine("base")
    chunks = list(run.run())
    decisions = run.report.decisions
    assert len(chunks) == run.report.chunks_done == 7
    steps = {branch: sum(len(taken) for taken in decisions[branch].values()) for branch in decisions}
    assert steps == {"past": 56, "text": 42, "alone": 42}  # from t = 0.3 on, the last quarter, only the past counts


def test_cancelling_and_progress():
    told = []
    run = engine("distill", on_progress=told.append)
    run.cancelled = lambda: len(told) == 3
    with pytest.raises(Cancelled, match="0 of 5"):
        list(run.run())
    assert [progress.tick for progress in told] == [1, 2, 3] and told[0].ticks == run.schedule.ticks


def test_reuse_of_a_base_network_recomputes_where_the_guidance_changes():
    run = engine("base", Settings(ReuseSettings("fixed", steps=(0,), order=0)))
    list(run.run())
    assert [step for step, taken in enumerate(run.report.decisions["past"][1]) if taken] == [0, 6]
    assert run.report.decisions["past"][6][-1]  # the run's last step


def test_held_residuals_are_refused():
    with pytest.raises(UserError, match="velocity held"):
        engine("base", Settings(ReuseSettings("even", held="residual")))


def test_clean_chunks_that_are_seen():
    assert clean_chunks_seen((5, 4, 3, 2), 0) == 1
    assert clean_chunks_seen((5, 4, 3, 2), 3) == 3
    assert clean_chunks_seen((5, 4, 3, 2), 9) == 4
    assert clean_chunks_seen((4,), 0) == 3
    assert clean_chunks_seen((5, 5), 0) == 4


def test_memory_plan_of_the_published_network():
    def gigabytes(seconds: int, settings: Settings, sampling: MagiSampling) -> float:
        schedule = magi_schedule(seconds * 24 // 4, 64)
        shape, _ = history_plan(MAGI_4_5B, schedule, settings, sampling, (1, 16, FRAMES, 90, 90))
        return shape.bytes(2) / 2**30

    everything, budget = replace(OFF, clean_pass=False), published(0.01, budget=5)
    assert gigabytes(10, everything, PUBLISHED_FLOWCACHE) == pytest.approx(15.9, abs=0.1)  # 10 chunks of 12,150 tokens
    assert gigabytes(60, everything, PUBLISHED_FLOWCACHE) == pytest.approx(95.3, abs=0.1)
    assert (
        gigabytes(60, budget, PUBLISHED_FLOWCACHE)
        == gigabytes(10, budget, PUBLISHED_FLOWCACHE)
        == pytest.approx(14.3, abs=0.1)
    )
    plans = [plan_magi_history(MAGI_4_5B, (720, 720), 60 * 24, HistorySettings(budget)) for budget in (None, 5)]
    assert [plan.unbounded / 2**30 for plan in plans] == pytest.approx([95.3] * 2, abs=0.1)
    assert [plan.planned / 2**30 for plan in plans] == pytest.approx([9.5, 15.9], abs=0.1)  # 5 + 4 active + 1 waiting
    assert gigabytes(60, OFF, MagiSampling()) == gigabytes(10, OFF, MagiSampling()) == pytest.approx(9.5, abs=0.1)


def test_a_batch_equals_its_rows():
    run, single = engine("distill_other_order"), engine("distill_other_order")
    start, text = run.start, run.text

    def other(chunk: int) -> torch.Tensor:
        return start(chunk).flip(-1)

    run.start = lambda chunk: torch.cat([start(chunk), other(chunk)])
    run.text = lambda chunk: MagiText(*(torch.cat([part, part]) for part in text(chunk)[:2]))
    run.null = MagiText(*(torch.cat([part, part]) for part in run.null[:2]))
    both = torch.cat([chunk.latent for chunk in run.run()], dim=2)
    single.start = other
    assert relative_error(both[1:], torch.cat([chunk.latent for chunk in single.run()], dim=2)) < 1e-5


def test_given_frames_that_do_not_fit_the_schedule_are_told():
    run = engine("video")
    run.given = run.given[:, :, :6]
    with pytest.raises(UserError, match="6 latent frames are given, but the schedule is one for 2"):
        list(run.run())
