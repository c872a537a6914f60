"""MAGI-1 through the nodes equals its engine alone; its VAE and text encoder in the host."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from graph import Graph, sample
from safetensors.torch import save_file

from flowcache_core.backbones.magi import MagiBackbone, MagiNetwork
from flowcache_core.families import family_preset
from flowcache_core.history import HistorySettings
from flowcache_core.magi_engine import PUBLISHED_FLOWCACHE, MagiEngine, MagiSampling, magi_schedule
from flowcache_core.magi_text import SpecialTokens, caption_text, null_text
from flowcache_core.magi_vae import LATENT_SCALE, MagiVae, MagiVaeConfig
from flowcache_core.solvers import chunk_noise
from tests.magi_weights import SMALL, SMALL_FP8, fill, normal

BASE = replace(SMALL, channels=16, caption_width=4096, caption_tokens=800)
CONFIGS = {"base": BASE, "distilled": replace(BASE, distilled=True), "fp8": replace(SMALL_FP8, channels=16, caption_width=4096, caption_tokens=800)}
FAMILY = {"base": "magi", "distilled": "magi distilled", "fp8": "auto"}
FRAMES, STEPS = 6, 8
VAE = {
    "_class_name": "ViTVAE",
    "ddconfig": {"embed_dim": 256, "depth": 1, "num_heads": 4, "mlp_ratio": 2, "z_chans": 16, "video_size": 64, "conv_last_layer": True,
                 "qkv_bias": True, "ln_in_attn": True},
}  # fmt: skip


def network_of(name: str) -> MagiNetwork:
    network = MagiNetwork(CONFIGS[name])
    fill(network, velocity=1 / 3)
    return network.requires_grad_(False).eval()


def tokens() -> SpecialTokens:
    shapes = {"caption_token": (1, 4096), "logo_token": (1, 4096), "other_tokens": (17, 4096)}
    return SpecialTokens(*(normal(name, shape).half() for name, shape in shapes.items()))


def vae_alone() -> MagiVae:
    vae = MagiVae(MagiVaeConfig.from_upstream(VAE))
    fill(vae)
    return vae.requires_grad_(False).eval()


@pytest.fixture(scope="module", autouse=True)
def files(server):
    models = server.base / "models"
    for name in CONFIGS:
        folder = models / "diffusion_models" / f"magi_{name}"
        folder.mkdir()
        save_file(network_of(name).state_dict(), folder / "model.safetensors")
        special = tokens()
        np.savez(folder / "special_tokens.npz", caption_token=special.caption, logo_token=special.logo, other_tokens=special.other)
    folder = models / "vae" / "magi"
    folder.mkdir()
    save_file(dict(vae_alone().state_dict()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(VAE))


def load(graph: Graph, name: str = "base", **inputs) -> tuple:
    settings = {"family": FAMILY[name], "weight_type": "default"} | inputs
    return graph.add("FlowCacheLoadARVideoModel", model_name=f"magi_{name}/model.safetensors", **settings), 0


def extend(graph: Graph, model: tuple, caption: int = 0, **inputs) -> str:
    positive = graph.add("TestCaption", seed=caption, tokens=9, width=4096)
    negative = graph.add("TestCaption", seed=100, tokens=1, width=4096)
    settings = dict(seed=4, chunks=3, steps=STEPS, guidance=0.0, frames_per_chunk=0, lag=-1, width=48, height=32)
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=model, positive=(positive, 0), negative=(negative, 0), **settings | inputs
    )


def alone(name: str = "base", preset: str = "off", chunks: int = 3, given: torch.Tensor | None = None, **changes) -> torch.Tensor:
    """The new chunks by the engine, in the host's space."""
    network, frames = network_of(name), 0 if given is None else given.shape[2]
    schedule = magi_schedule(chunks * FRAMES - frames % FRAMES, STEPS, frames)
    embedding = torch.randn(1, 256, 4096, generator=torch.Generator().manual_seed(0))
    mask, special = (torch.arange(256) < 9)[None], tokens()
    settings = family_preset(preset, "magi", 0, HistorySettings())
    engine = MagiEngine(
        MagiBackbone(network),
        schedule,
        settings,
        lambda chunk: caption_text(embedding, mask, special, schedule.total_chunks - 1 - chunk),
        null_text(network.y_embedder.null_caption_embedding),
        lambda chunk: chunk_noise(4, chunk, (1, 16, FRAMES, 4, 6)),
        replace(MagiSampling() if settings.clean_pass else PUBLISHED_FLOWCACHE, **changes),
        None if given is None else given * LATENT_SCALE,
    )
    return torch.cat([chunk.latent for chunk in engine.run()], dim=2) / LATENT_SCALE


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "preset"), [("base", "off"), ("base", "balanced"), ("distilled", "off"), ("distilled", "paper fast"), ("fp8", "off")]
)
def test_nodes_equal_the_engine(server, name, preset):
    graph = Graph()
    patched = graph.add("FlowCache", model=load(graph, name), preset=preset, history_budget=0)
    ours = sample(server, graph, extend(graph, (patched, 0)))
    assert error(ours, alone(name, preset)) < (2e-2 if name == "fp8" else 1e-3)
