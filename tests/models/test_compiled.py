"""Each backbone's trunk under torch.compile: one graph without a break, used again as chunks go on, same result."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from flowcache_core.engine.loop import Engine, guidance
from flowcache_core.engine.runner import Runner
from flowcache_core.history.settings import HistorySettings
from flowcache_core.models.magi.engine import MagiEngine, magi_schedule
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork, MagiText
from flowcache_core.models.presets import OFF
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.solvers.noise_levels import linear
from tests.helpers import golden_weights
from tests.helpers.magi_weights import SMALL, fill, normal

MAGI = replace(SMALL, layers=1, caption_tokens=64)
BUDGET = replace(OFF, history=HistorySettings(2))


def wan_engine(backbone, settings, scale: float) -> Engine:
    config, schedule = backbone.network, ChunkSchedule(5, 2, 1)
    runner = Runner(backbone, schedule, settings, 1)
    texts = (normal(branch, (1, 5, backbone.text_dim)) for branch in ("cond", "uncond"))
    start = lambda chunk: normal(f"noise.{chunk}", (1, config.out_dim, 1, 4, 6))  # noqa: E731
    return Engine(runner, guidance(runner, *texts, scale), linear(2), start)


def magi_engine(settings) -> MagiEngine:
    network = MagiNetwork(MAGI)
    fill(network, velocity=MAGI.input_scale / 3)
    text = MagiText(normal("caption", (1, 64, MAGI.caption_width)), torch.ones(1, 64))
    return MagiEngine(
        MagiBackbone(network.eval().requires_grad_(False)),
        magi_schedule(6 * 8, 4),
        settings,
        text=lambda chunk: text,
        null=text._replace(captioned=False),
        start=lambda chunk: normal(f"noise.{chunk}", (1, MAGI.channels, 6, 2, 4)),
    )


def wan() -> WanBackbone:
    return WanBackbone(golden_weights.network(replace(golden_weights.SMALL, num_layers=1)))


def skyreels() -> SkyReelsBackbone:
    return SkyReelsBackbone(golden_weights.network(replace(golden_weights.SMALL_FPS, num_layers=1)))


ENGINES = {
    "wan": lambda: wan_engine(wan(), OFF, 2.0),
    "skyreels": lambda: wan_engine(skyreels(), BUDGET, 1.0),
    "magi": lambda: magi_engine(OFF),
}


@pytest.mark.parametrize("name", ENGINES)
def test_one_graph_serves_all_chunks(name):
    plain = torch.cat([chunk.latent for chunk in ENGINES[name]().run()], dim=2)
    torch._dynamo.reset()
    counters.clear()
    engine = ENGINES[name]()
    backbone = engine.backbone if name == "magi" else engine.runner.backbone
    backbone.trunk = torch.compile(backbone.trunk, fullgraph=True, dynamic=True, backend="eager")
    graphs, latents = [], []
    for chunk in engine.run():
        graphs.append(counters["stats"]["unique_graphs"])
        latents.append(chunk.latent)
    assert len(set(graphs[2:])) == 1
    assert (torch.cat(latents, dim=2) - plain).abs().max() < 1e-4
