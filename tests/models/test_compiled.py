"""Each backbone's blocks under torch.compile: a few graphs for all layers, used again as chunks go on."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.models.magi.forward import magi_engine, magi_schedule
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork, MagiText
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, HistorySettings
from flowcache_core.solvers.noise_levels import linear
from tests.helpers import golden_weights
from tests.helpers.magi_weights import SMALL, fill, normal
from tests.helpers.runs import build, video

MAGI = replace(SMALL, layers=3, caption_tokens=64)
MOST_GRAPHS = 8  # a block's parts, for one chunk and for several
BUDGET = replace(OFF, history=HistorySettings(2))


def wan_engine(backbone, settings, scale: float) -> Engine:
    texts = (normal(branch, (1, 5, backbone.text_dim)) for branch in ("cond", "uncond"))
    start = lambda chunk: normal(f"noise.{chunk}", (1, backbone.channels, 1, 4, 6))  # noqa: E731
    return build(backbone, ChunkSchedule(5, 2, 1), classifier_free(*texts, scale), linear(2), start, settings)


def small_magi(settings) -> Engine:
    network = MagiNetwork(MAGI)
    fill(network, velocity=MAGI.input_scale / 3)
    text = MagiText(normal("caption", (1, 64, MAGI.caption_width)), torch.ones(1, 64))
    return magi_engine(
        MagiBackbone(network.eval().requires_grad_(False)),
        magi_schedule(6 * 8, 4),
        settings,
        text=lambda chunk: text,
        null=text._replace(captioned=False),
        start=lambda chunk: normal(f"noise.{chunk}", (1, MAGI.channels, 6, 2, 4)),
        shape=(1, MAGI.channels, 6, 2, 4),
        device=torch.device("cpu"),
    )


def wan() -> WanBackbone:
    return WanBackbone(golden_weights.network(replace(golden_weights.SMALL, num_layers=3)))


def skyreels() -> SkyReelsBackbone:
    return SkyReelsBackbone(golden_weights.network(replace(golden_weights.SMALL_FPS, num_layers=3)))


ENGINES = {
    "wan": lambda: wan_engine(wan(), OFF, 2.0),
    "skyreels": lambda: wan_engine(skyreels(), BUDGET, 1.0),
    "magi": lambda: small_magi(OFF),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_few_graphs_serve_all_chunks(name):
    plain = video(ENGINES[name]())
    torch._dynamo.reset()
    counters.clear()
    engine = ENGINES[name]()
    backbone = engine.forward.backbone
    backbone.compile(backend="eager")
    graphs, latents = [], []
    for chunk in engine.run():
        graphs.append(counters["stats"]["unique_graphs"])
        latents.append(chunk.latent)
    assert len(set(graphs[2:])) == 1
    assert 2 <= graphs[-1] <= MOST_GRAPHS
    assert not counters["graph_break"]
    assert (torch.cat(latents, dim=2) - plain).abs().max() < 1e-6
