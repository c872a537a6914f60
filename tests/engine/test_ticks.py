"""What a tick is made of: each layer's weights once, for all chunks; and few files between the call and the network."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import flowcache_core
from flowcache_core import generation
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.generation import generate
from flowcache_core.models import wan
from flowcache_core.models.magi.forward import PUBLISHED_FLOWCACHE, MagiSampling
from flowcache_core.models.presets import PRESETS
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Fixed, HistorySettings, Settings
from flowcache_core.solvers.noise_levels import linear
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.magi_runs import magi_run
from tests.helpers.runs import build
from tests.helpers.tiny import TINY

CORE = Path(flowcache_core.__file__).parent
# A text's keys and values are made once, in all layers, before it is first needed.
OF_TEXTS = ("cross_attn.k", "cross_attn.v", "cross_attn.norm_k", "linear_kv_xattn", "k_layernorm_xattn")


def words(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def noise(chunk: int) -> torch.Tensor:
    return chunk_noise(5, chunk, (1, TINY.in_dim, 2, 6, 4))


def visited(engine: Engine, blocks: nn.ModuleList) -> list[list[tuple[int, str]]]:
    """Runs an engine; for each tick, the blocks' modules in the order in which they are called."""
    ticks: list[list[tuple[int, str]]] = [[]]
    for number, block in enumerate(blocks):
        for name, module in block.named_modules():
            if name and not name.endswith(OF_TEXTS) and not list(module.children()):
                module.register_forward_hook(lambda *call, at=(number, name): ticks[-1].append(at))
    engine.on_progress = lambda told: ticks.append([])
    list(engine.run())
    return [tick for tick in ticks if tick]


def stretches(numbers: list[int]) -> int:
    """How often a first block is begun with: 1 where the numbers are sorted."""
    return 1 + sum(after < before for before, after in zip(numbers, numbers[1:], strict=False))


RUNS = {
    "whole": OFF,
    "budget": Settings(history=HistorySettings(2)),
    "relative": Settings(history=HistorySettings(2, relative=True)),
    "spread": PRESETS["high"],
    "slots stay": Settings(Fixed((0, 1, 3)), history=HistorySettings(2)),
}


@pytest.mark.parametrize("together", [4096, 1])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", RUNS)
def test_a_layers_weights_are_used_in_one_stretch_a_forward(backbone, monkeypatch, name, scale, together):
    """However many chunks go through them: together, or where they are large, one by one."""
    monkeypatch.setattr("flowcache_core.history.plan.FORWARD_TOKENS", together)
    guidance = classifier_free(words(0), words(1), scale)
    schedule = ChunkSchedule(6, 12, 3)
    engine = build(backbone, schedule, guidance, linear(12), noise, RUNS[name])
    ticks, passes = [], 0
    for at, calls in enumerate(visited(engine, backbone.network.blocks)):
        numbers = [number for number, _ in calls]
        finished = RUNS[name].history.budget is not None and (at + 1) % 3 == 0 and at >= 11
        assert stretches(numbers) <= 1 + finished  # with a budget the clean pass is a forward of its own
        passes += stretches(numbers) - 1
        ticks.append([name for number, name in calls if number == 0].count("self_attn.q"))
    assert passes <= 6
    one_by_one = 2 if name == "slots stay" else 4  # not aligned: few chunks are recomputed on the same tick
    assert max(ticks) >= one_by_one if together == 1 else max(ticks) <= 2


@pytest.mark.parametrize(
    ("name", "sampling", "sweeps", "alone"),
    [
        ("short_distill", PUBLISHED_FLOWCACHE, 1, 0),
        ("short_distill", MagiSampling(), 1, 1),
        ("short", MagiSampling(), 2, 4),
    ],
)
def test_a_layers_weights_are_used_in_one_stretch_a_branch_of_magi(name, sampling, sweeps, alone):
    """Beside forwards of single chunks that see themselves alone."""
    engine = magi_run(name, sampling=sampling, chunks=6)
    ticks = visited(engine, engine.forward.backbone.network.videodit_blocks.layers)
    counts = [stretches([number for number, _ in calls]) for calls in ticks]
    assert max(counts) <= sweeps + alone
    assert sweeps > 1 or alone or set(counts) == {1}


def files_between(monkeypatch, run) -> set[str]:
    """Files of the engine on the stack between `generate` and a block of the network."""
    found: set[str] = set()
    block, began = wan.WanBackbone.block.__code__, generation.generate.__code__

    def watch(frame, event, argument) -> None:
        if event != "call" or frame.f_code is not block:
            return
        above = frame.f_back
        while above is not None:
            file = Path(above.f_code.co_filename)
            if file.is_relative_to(CORE):
                found.add(str(file.relative_to(CORE)))
            if above.f_code is began:
                return
            above = above.f_back

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_few_files_lie_between_the_call_and_the_network(backbone, monkeypatch):
    """Whoever reads how a video is made reads these, in this order."""

    def run() -> None:
        generate(
            backbone, words(0), 3, steps=4, lag=2, frames_per_chunk=2, latent_size=(6, 4), settings=OFF,
            guidance_scale=3.0, negative=words(1),
        )  # fmt: skip

    read = {"generation.py", "engine/loop.py", "engine/guidance.py", "engine/causal.py", "engine/layers.py"}
    assert files_between(monkeypatch, run) == read
