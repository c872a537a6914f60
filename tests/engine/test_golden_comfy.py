"""Our forward over the history against ComfyUI's CausalWanModel on the same weights."""

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.engine.loop import guidance
from flowcache_core.engine.runner import Runner
from flowcache_core.models.presets import OFF
from flowcache_core.models.rotary import Rotary
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import CLEAN, ChunkSchedule, Place
from tests.helpers.golden_weights import network, text
from tests.helpers.magi_weights import normal
from tests.helpers.paths import GOLDEN_FOLDER
from tests.helpers.tiny import ask

GOLDEN = load_file(GOLDEN_FOLDER / "comfy_causal_wan.safetensors")


def velocities(rotary: Rotary | None = None, clean_pass: bool = True) -> list[torch.Tensor]:
    backbone = WanBackbone(network())
    backbone.rotary = rotary or backbone.rotary
    runner = Runner(backbone, ChunkSchedule(3, 1, 1), OFF, 2)
    denoise, found = guidance(runner, text("cond")), []
    for chunk, sigma in enumerate((0.9, 0.5, 0.7)):
        x = normal(f"chunk{chunk}", (1, 16, 2, 4, 6))
        found.append(ask(denoise, x, sigma, Place(chunk, 0, chunk)).clone())
        if clean_pass:
            ask(denoise, x, 0.0, Place(chunk, CLEAN, chunk))
        runner.commit(chunk)
    return found


def error(found: list[torch.Tensor], chunk: int) -> float:
    expected = GOLDEN[f"velocity.{chunk}"]
    return ((found[chunk] - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", range(3))
def test_every_chunk_over_its_history(chunk):
    assert error(velocities(), chunk) < 1e-4


def test_a_wrong_position_or_history_would_be_noticed():
    assert error(velocities(Rotary(32, theta=3000.0)), 1) > 1e-3
    assert error(velocities(clean_pass=False), 1) > 1e-2
