"""What is planned before a run is what it allocates; a tick's chunks need nothing of an earlier tick but clean history.

Both for every kind of run: with and without a budget, one chunk at a time and several, Wan's layout and MAGI-1's.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from flowcache_core import generate
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.joint import JointForward
from flowcache_core.engine.loop import Engine
from flowcache_core.engine.rolling import RollingForward
from flowcache_core.errors import UserError
from flowcache_core.history import room
from flowcache_core.history.cache import History
from flowcache_core.history.plan import window_bytes
from flowcache_core.lab.meter import Meter
from flowcache_core.models.magi.forward import MagiForward, MagiSampling
from flowcache_core.models.presets import PRESETS
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from flowcache_core.schedule import ChunkSchedule, Given
from flowcache_core.settings import OFF, Compression, Drift, Fixed, HistorySettings, Off, Settings
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.magi_runs import magi_run
from tests.helpers.runs import build, video
from tests.helpers.tiny import TINY, tiny_network

FRAMES, SIZE = 1, (4, 4)
SCHEDULES = {"MAGI-1": (64, 16), "SkyReels-V2": (50, 5), "Self-Forcing": (4, 4)}
HISTORIES = {
    "whole": HistorySettings(),
    "budget": HistorySettings(2),
    "relative": HistorySettings(2, relative=True),
    "window": HistorySettings(2, Compression("window")),
}


def noise(chunk: int, frames: int = FRAMES) -> torch.Tensor:
    return chunk_noise(1, chunk, (1, TINY.in_dim, frames, *SIZE))


def words(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def wan_engine(schedule: ChunkSchedule, settings: Settings, scale: float = 1.0, **more) -> Engine:
    guidance = classifier_free(words(0), words(1), scale)
    backbone = WanBackbone(tiny_network())
    return build(backbone, schedule, guidance, magi(schedule.steps), noise, settings, **more)


def all_histories(engine: Engine) -> list[History]:
    forward = engine.forward
    return [forward.history] if hasattr(forward, "history") else [*forward.histories.values(), *forward.spare]


@pytest.mark.parametrize("memory", ["auto", "system"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("given", [(0, 0), (1, 2)])
@pytest.mark.parametrize("name", HISTORIES)
def test_planned_bytes_are_the_allocated_ones(name, memory, scale, given):
    for lag, clean_pass, reuse in product((3, 1), (True, False), (Off(), Drift(0.1, warmup=1))):
        settings = Settings(reuse, history=replace(HISTORIES[name], memory=memory), clean_pass=clean_pass)
        engine = wan_engine(ChunkSchedule(4, 3, lag), settings, scale, lead=given[0], end=given[1])
        report = engine.report
        assert report.history_bytes_planned == report.history_bytes_allocated, (lag, clean_pass, reuse)
        if given[0]:
            engine.give(Given.LEAD, noise(100, given[0]))
            engine.give(Given.END, noise(200, given[1]))
        list(engine.run())
        engine.save()
        assert report.history_bytes_planned == report.history_bytes_allocated == engine.forward.history_bytes[1]
        assert report.history_bytes_peak <= report.history_bytes_planned


@pytest.mark.parametrize("memory", ["auto", "system"])
@pytest.mark.parametrize("name", ["short", "short_distill"])
@pytest.mark.parametrize("kept", HISTORIES)
def test_planned_bytes_are_the_allocated_ones_of_magi(kept, name, memory):
    for visible, clean_pass in product((MagiSampling().visible, ()), (True, False)):
        settings = replace(OFF, history=replace(HISTORIES[kept], memory=memory), clean_pass=clean_pass)
        engine = magi_run(name, settings, MagiSampling(visible=visible))
        report = engine.report
        assert report.history_bytes_planned == report.history_bytes_allocated, (visible, clean_pass)
        list(engine.run())
        assert report.history_bytes_planned == engine.forward.history_bytes[1], (visible, clean_pass)


def test_a_bounded_history_of_many_chunks_takes_about_its_budget():
    """A published 1.3B: 21 chunks on MAGI-1's schedule with a budget of 5 are 30 layers of 5, and one layer of 9."""
    sizes = wan_engine(ChunkSchedule(1, 1, 1), OFF).forward.plan
    settings = replace(OFF, history=HistorySettings(5, Compression(queries=1)))
    bounded = wan_engine(ChunkSchedule(21, 64, 16), settings).forward.plan
    a_chunk = sizes.token_bytes * sizes.chunk_tokens
    assert bounded.kind == "shared" and bounded.slots == 4
    assert bounded.scratch_bytes == (5 + 4) * a_chunk
    numbers = 4 * TINY.num_heads * 5 * bounded.chunk_tokens
    assert bounded.stored_bytes == TINY.num_layers * (5 * a_chunk + numbers)


@torch.inference_mode()
def spoil(histories: list[History]) -> None:
    """Overwrites everything that is not clean history."""
    for history in histories:
        for layer in history.layers:
            for part in layer:
                part.here[:, :, history.clean - part.tokens_moved :] = float("nan")
        history.tokens[:, :, :, history.clean :] = -1
        for part in history.scratch or ():
            part.here.fill_(float("nan"))


def spoiled(engine: Engine) -> torch.Tensor:
    """The video of a run that is spoiled after every tick."""
    told = engine.on_progress

    def after(progress) -> None:
        spoil(all_histories(engine))
        told(progress)

    engine.on_progress = after
    spoil(all_histories(engine))
    return video(engine)


# Runs with many forwards are slow: those see one bounded history.
KEPT = [*product(["off", "high"], ["budget"]), *product(["balanced", "fast"], HISTORIES)]


@pytest.mark.parametrize(("preset", "kept"), KEPT)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tick_needs_nothing_but_clean_history(name, kept, preset):
    schedule = ChunkSchedule(5 if name != "SkyReels-V2" else 12, *SCHEDULES[name])
    settings = replace(PRESETS[preset], history=HISTORIES[kept])
    scale = 3.0 if kept == "budget" else 1.0
    plain = video(wan_engine(schedule, settings, scale))
    assert torch.isfinite(plain).all()
    assert torch.equal(spoiled(wan_engine(schedule, settings, scale)), plain)


SEEN = MagiSampling().visible
MAGI_CASES = [
    *product(["short"], ["off", "high"], [("whole", SEEN)]),
    *product(["short"], ["balanced", "fast"], [("whole", SEEN), ("window", SEEN), ("whole", ())]),
    *product(["short"], ["balanced", "fast"], [("budget", ()), ("relative", ())]),
    *product(["short_distill"], ["off", "balanced"], [("whole", SEEN), ("budget", ())]),
]


@pytest.mark.parametrize(("name", "preset", "history"), MAGI_CASES)
def test_a_tick_of_magi_needs_nothing_but_clean_history(name, preset, history):
    kept, visible = history
    settings = replace(PRESETS[preset], history=HISTORIES[kept])

    def made() -> Engine:
        steps = 64 if name == "short" and preset in ("balanced", "fast") else 16
        return magi_run(name, settings, MagiSampling(visible=visible), chunks=4, steps=steps, given_frames=0)

    plain = video(made())
    assert torch.isfinite(plain).all()
    assert torch.equal(spoiled(made()), plain)


def test_what_is_not_aligned_does_need_more():
    """The proof above would notice: a rule that watches lets chunks read keys of earlier ticks."""
    schedule = ChunkSchedule(5, 12, 3)
    for kept in (HistorySettings(), HistorySettings(2)):
        settings = Settings(Fixed((0, 1, 2, 5)), history=kept)
        assert torch.isnan(spoiled(wan_engine(schedule, settings))).any()


def test_texts_of_chunks_that_are_never_active_together_take_no_memory():
    planned = {texts: wan_engine(ChunkSchedule(8, 4, 4), OFF, texts=texts).forward.plan for texts in (2, 1000)}
    assert planned[1000].texts == planned[2].texts == 2


def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(room, "system_memory", lambda: 2**10)
    monkeypatch.setattr(History, "__init__", lambda *args: pytest.fail("it was allocated"))
    for forward in (MagiForward, JointForward, RollingForward):
        monkeypatch.setattr(forward, "__init__", lambda *args, **more: pytest.fail("it was allocated"))
    for make in (
        lambda: wan_engine(ChunkSchedule(8, 4, 4), OFF),
        lambda: magi_run("base"),
        lambda: wan_engine(ChunkSchedule(8, 4, 4), OFF, seeing="joint"),
        lambda: wan_engine(ChunkSchedule(8, 4, 1), OFF, seeing="rolling"),
    ):
        with pytest.raises(UserError, match=r"takes [\d.,]+ GiB beside the model, and this machine has 0.0 GiB"):
            make()


def test_latents_that_are_kept_count_as_well(monkeypatch, backbone):
    """Of a bounded history, which alone would fit whatever the length."""
    settings = replace(OFF, history=HistorySettings(2))
    plan = wan_engine(ChunkSchedule(4, 4, 4), settings).forward.plan
    monkeypatch.setattr(room, "system_memory", lambda: 2 * plan.bytes)
    monkeypatch.setattr(History, "__init__", lambda *args: pytest.fail("it was allocated"))
    with pytest.raises(UserError, match="fewer frames a chunk or fewer chunks"):
        generate(backbone, words(0), 20_000, steps=4, lag=4, settings=settings, frames_per_chunk=1, latent_size=SIZE)


@pytest.mark.parametrize("lag", [0, 2])
def test_a_windows_planned_bytes_are_those_that_it_takes(lag):
    """A 1.3B's width, of which the first layers take as much as all."""
    config, meter, chunks = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=1), Meter(), 4

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    with torch.device("meta"):
        network = WanNetwork(config).to(torch.bfloat16)
    network.requires_grad_(False)
    backbone, caption = WanBackbone(network, attention=meter.attention), empty(1, 512, config.text_dim)
    with meter:
        engine = build(
            backbone, ChunkSchedule(chunks, 2, lag), classifier_free(caption, caption, 3.0), magi(2),
            lambda chunk: empty(1, 16, 3, 60, 104), seeing="joint", attention=meter.attention,
        )  # fmt: skip
        list(engine.run())
    planned = window_bytes(replace(backbone.sizes, text_tokens=512), (30, 52), 3 * chunks, 2, 2)
    assert 1.0 <= planned / meter.peak <= 1.15


def test_the_memory_of_this_machine_is_known():
    assert room.system_memory() > 2**28
