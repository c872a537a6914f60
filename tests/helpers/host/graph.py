"""Prompts in API form, written short, and small random models for them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowcache_core.lab.comfy import Graph
from flowcache_core.models.wan import WanConfig, WanNetwork

SMALL = WanConfig(dim=96, ffn_dim=128, num_heads=2, num_layers=3, text_dim=64)


def random_network(seed: int = 0, config: WanConfig = SMALL) -> dict[str, torch.Tensor]:
    """Weights large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    network = WanNetwork(config)
    weights = {}
    for name, value in network.state_dict().items():
        if value.ndim > 1:
            value = torch.randn_like(value) * 1.2 * value[0].numel() ** -0.5
        weights[name] = torch.full_like(value, 1.3) if "norm_q" in name or "norm_k" in name else value
    return weights


def write_network(path: Path, weights: dict[str, torch.Tensor], config: WanConfig = SMALL, **stamp) -> None:
    transformer = {"num_heads": config.num_heads, "text_dim": config.text_dim, "causal_ar": True, **stamp}
    transformer = {name: value for name, value in transformer.items() if value is not None}
    save_file(weights, path, metadata={"config": json.dumps({"transformer": transformer})})


def native(
    graph: Graph, model: tuple, frames: int = 6, steps: int = 4, cfg: float = 1.0, block: int = 2, seed: int = 5
) -> str:
    """The host's own way: SamplerARVideo under SamplerCustomAdvanced. Returns the sampling node."""
    positive = graph.add("FlowCacheDemoPrompt", caption="a red circle")
    negative = graph.add("FlowCacheDemoPrompt", caption="")
    guider = graph.add("CFGGuider", model=model, positive=(positive, 0), negative=(negative, 0), cfg=cfg)
    noise = graph.add("RandomNoise", noise_seed=seed)
    sampler = graph.add("SamplerARVideo", num_frame_per_block=block)
    return custom(graph, model, (guider, 0), (noise, 0), (sampler, 0), frames, steps)


def custom(graph: Graph, model: tuple, guider: tuple, noise: tuple, sampler: tuple, frames: int, steps: int) -> str:
    latent = graph.add("EmptyARVideoLatent", width=64, height=64, length=4 * frames - 3, batch_size=1)
    sigmas = graph.add("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    return graph.add(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=(sigmas, 0),
        latent_image=(latent, 0),
    )


def sample(server, graph: Graph, node: str, slot: int = 0) -> torch.Tensor:
    """Runs a graph and returns the latent that a node gives."""
    save = graph.add("SaveLatent", samples=(node, slot), filename_prefix="test")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, save)
    return load_file(file)["latent_tensor"]


def fails(server, graph: Graph, node: str) -> str:
    """Runs a graph that must fail on a node; returns the message, which must be one line of plain words."""
    if not any(entry["class_type"].startswith("Save") for entry in graph.values()):
        graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error is not None, "it ran"
    assert outcome.error["node_id"] == node, outcome.error["node_type"]
    message = outcome.error["exception_message"].strip()
    assert "\n" not in message, message
    kind = outcome.error["exception_type"]  # what the page shows in front of the message
    assert kind == "flowcache_core.UserError", f"{kind}: {message}"
    return message
