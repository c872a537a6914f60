"""Each family through the nodes equals the engine alone on the same weights, noise and caption."""

from dataclasses import replace

import pytest
import torch
from graph import SMALL, Graph, random_network, sample, write_network

from flowcache_core.backbones.wan import WanNetwork
from flowcache_core.demo.captions import embed_caption
from flowcache_core.families import FAMILIES, SOLVERS, family_preset, make_backbone
from flowcache_core.generate import generate
from flowcache_core.history import HistorySettings

CONFIGS = {"causal": SMALL, "skyreels": replace(SMALL, fps=True), "wan": SMALL}


def extend(graph: Graph, family: str, preset: str, guidance: float, **inputs) -> str:
    model = graph.add("FlowCacheLoadARVideoModel", model_name=f"{family}.safetensors", family=family, weight_type="fp32")
    patched = graph.add("FlowCache", model=(model, 0), preset=preset, history_budget=0)
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(words[0], 0), negative=(words[1], 0),
        seed=4, chunks=3, steps=20 if family == "skyreels" else 4, guidance=guidance, frames_per_chunk=2, lag=4,
        width=64, height=64, **inputs,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def files(server):
    for family, config in CONFIGS.items():
        folder = server.base / "models" / "diffusion_models"
        write_network(folder / f"{family}.safetensors", random_network(2, config), config)


def alone(family: str, preset: str, guidance: float, prefix: torch.Tensor | None = None):
    usual, config = FAMILIES[family], CONFIGS[family]
    network = WanNetwork(config)
    network.load_state_dict(random_network(2, config))
    backbone = make_backbone(family, network.eval().requires_grad_(False), 24, torch.nn.functional.scaled_dot_product_attention)
    steps = 20 if family == "skyreels" else 4
    return generate(
        backbone, embed_caption("a red circle"), 3, steps=steps, lag=4, frames_per_chunk=2, seed=4,
        settings=family_preset(preset, family, config.dim, HistorySettings()), guidance_scale=guidance,
        negative=embed_caption(""), sigmas=usual.levels(steps), solver=SOLVERS[usual.solver], prefix=prefix,
    )  # fmt: skip


def normalised(latent: torch.Tensor) -> torch.Tensor:
    """The host's latents as the network sees them."""
    from flowcache_core.demo.vae import LATENT_MEAN, LATENT_STD

    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    return (latent - mean) / deviation


@pytest.mark.parametrize(
    "family, preset, guidance",
    [("causal", "off", 1.0), ("skyreels", "off", 3.0), ("skyreels", "paper slow", 3.0), ("skyreels", "balanced", 3.0), ("wan", "off", 2.0)],
)
def test_nodes_equal_the_engine(server, family, preset, guidance):
    graph = Graph()
    ours = normalised(sample(server, graph, extend(graph, family, preset, guidance)))
    expected = alone(family, preset, guidance)
    assert (ours - expected.latents).norm() / expected.latents.norm() < 2e-3


def test_the_frame_rate_reaches_the_network(server):
    results = []
    for fps in (16, 24):
        graph = Graph()
        node = extend(graph, "skyreels", "off", 3.0)
        graph["1"]["inputs"]["fps"] = fps
        results.append(sample(server, graph, node))
    assert not torch.allclose(*results, atol=1e-3)
