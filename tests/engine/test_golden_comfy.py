"""Our forward over the history against ComfyUI's CausalWanModel on the same weights."""

import pytest
import torch

from flowcache_core.engine.forward import Step
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.models.rotary import Rotary
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.settings import OFF, Settings
from tests.helpers.golden_weights import network, text
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden
from tests.helpers.runs import build

GOLDEN = golden("comfy_causal_wan")


def velocities(rotary: Rotary | None = None, settings: Settings = OFF) -> list[torch.Tensor]:
    backbone, found = WanBackbone(network()), []
    backbone.rotary = rotary or backbone.rotary
    latents = [normal(f"chunk{chunk}", (1, 16, 2, 4, 6)) for chunk in range(3)]
    guidance = classifier_free(text("cond"))
    forward = build(backbone, ChunkSchedule(3, 1, 1), guidance, [1.0, 0.0], latents.__getitem__, settings).forward
    for chunk, sigma in enumerate((0.9, 0.5, 0.7)):
        (velocity,) = forward.velocities([Step(latents[chunk], sigma, Place(chunk, 0, chunk))])
        found.append(velocity.value)
        forward.finish(chunk, latents[chunk])
    return found


def error(found: list[torch.Tensor], chunk: int) -> float:
    expected = GOLDEN[f"velocity.{chunk}"]
    return ((found[chunk] - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", range(3))
def test_every_chunk_over_its_history(chunk):
    assert error(velocities(), chunk) < 1e-4


def test_a_wrong_position_or_history_would_be_noticed():
    assert error(velocities(Rotary(32, theta=3000.0)), 1) > 1e-3
    assert error(velocities(settings=Settings(clean_pass=False)), 1) > 1e-2
