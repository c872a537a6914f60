"""The memory of a history, worked out before a run, against what runs allocate."""

from dataclasses import replace

import pytest
import torch

from flowcache_core.engine.loop import Engine, guidance
from flowcache_core.engine.rolling import RollingDenoise, RollingEngine, RollingHistory
from flowcache_core.engine.runner import Runner
from flowcache_core.history.compression import Compression
from flowcache_core.history.settings import HistorySettings
from flowcache_core.models.families import FAMILIES, Family
from flowcache_core.models.memory import plan_history
from flowcache_core.models.presets import OFF
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from flowcache_core.schedule import ChunkSchedule

# Wan 2.1's 1.3B: wan/configs/wan_t2v_1_3B.py
WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
NARROW = WanConfig(dim=24, ffn_dim=8, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
# As many chunks active at once as in the family's own schedule, in fewer steps.
SKYREELS = replace(FAMILIES["skyreels"], steps=10, lag=1)
CAUSAL = replace(FAMILIES["causal"], steps=1, lag=1)
CASES = {
    "SkyReels-V2, 97 frames": (SKYREELS, (960, 544), 97),
    "Self-Forcing, one minute": (CAUSAL, (832, 480), 60 * 16 + 1),
}


def looks_at_nothing(q, k, v):
    """Stands in for attention, whose time does not matter here; what is kept does."""
    return q


@torch.inference_mode()
def allocated(family: Family, size: tuple[int, int], chunks: int, history: HistorySettings) -> tuple[int, Runner]:
    """Bytes of the tensors that a finished run's history holds, and its runner."""
    torch.manual_seed(0)
    network = WanNetwork(NARROW).to(torch.bfloat16)
    network.patch_embedding.float()
    shape = (1, 4, family.chunk_frames, size[1] // 8, size[0] // 8)
    settings = replace(OFF, history=history, clean_pass=False)
    schedule = ChunkSchedule(chunks, family.steps, family.lag)
    runner = Runner(WanBackbone(network), schedule, settings, family.chunk_frames, looks_at_nothing)
    runner.plan_history(torch.empty(shape, dtype=torch.bfloat16, device="meta"), 1 if family.guidance == 1 else 2)
    text = torch.randn(1, 1, NARROW.text_dim, dtype=torch.bfloat16)
    levels = [1 - step / family.steps for step in range(family.steps + 1)]
    noise = torch.randn(shape, dtype=torch.bfloat16)
    for _ in Engine(runner, guidance(runner, text, text, family.guidance), levels, lambda chunk: noise).run():
        pass
    held = {}
    for kept in runner.histories.values():
        buffers = [part.here for layer in kept.layers for part in layer.parts]
        for part in (*buffers, kept.tokens, *kept.queries):
            held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(held.values()), runner


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "history",
    [
        HistorySettings(),
        HistorySettings(3, Compression(queries=1)),
        HistorySettings(3, Compression("window"), relative=True),
    ],
    ids=["whole", "budget", "relative window"],
)
def test_a_run_allocates_what_was_planned(name, history):
    family, size, frames = CASES[name]
    plan = plan_history(NARROW, family, size, frames, history)
    measured, runner = allocated(family, size, plan.chunks, history)
    assert plan.frames >= frames
    assert measured == pytest.approx(plan.planned, rel=0.02)
    assert runner.report.history_bytes_planned == plan.planned
    assert runner.report.history_bytes_allocated == pytest.approx(plan.planned, rel=0.02)
    assert runner.report.history_bytes_unbounded == plan.unbounded


@pytest.mark.parametrize("name", CASES)
def test_at_full_width(name):
    """Keys and values in bfloat16, and a number of 4 bytes a token and head."""
    family, size, frames = CASES[name]
    plan = plan_history(WAN_1_3B, family, size, frames)
    tokens = (size[0] // 16) * (size[1] // 16) * plan.chunks * family.chunk_frames
    branches = 2 if family is SKYREELS else 1
    assert plan.planned == plan.unbounded == branches * 30 * tokens * (2 * 1536 * 2 + 12 * 4)
    bounded = plan_history(WAN_1_3B, FAMILIES["causal"], size, frames, HistorySettings(6)).planned
    assert bounded < plan_history(WAN_1_3B, FAMILIES["causal"], size, frames).planned
    longer = plan_history(WAN_1_3B, FAMILIES["causal"], size, 10 * frames, HistorySettings(6)).planned
    assert longer == bounded


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [3, 12])
def test_rolling_forcing(chunks):
    family, size = FAMILIES["rolling"], (64, 64)
    backbone = WanBackbone(WanNetwork(NARROW))
    history = RollingHistory(family.chunk_frames)
    denoise = RollingDenoise(backbone, torch.randn(1, 1, NARROW.text_dim), history)
    noise = torch.randn(1, 4, 3, 8, 8)
    schedule = ChunkSchedule(chunks, family.steps, family.lag)
    engine = RollingEngine(schedule, denoise, family.levels(5), lambda chunk: noise, lambda chunk, step: noise)
    for _ in engine.run():
        pass
    frames = 4 * chunks * family.chunk_frames - 3
    assert plan_history(NARROW, family, size, frames, itemsize=4).planned == history.bytes
