"""Prompts of mixed kind over a small random network, for tests that send many of them."""

import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from tests.helpers.host.comfy_server import Outcome, Server
from tests.helpers.host.graph import Graph, native, random_network, write_network

NETWORK = "reliable.safetensors"


def prepare(server: Server) -> None:
    """Puts the small random network where the prompts look for it."""
    write_network(server.base / "models" / "diffusion_models" / NETWORK, random_network())


def extend(graph: Graph, seed: int, chunks: int = 2, preset: str = "balanced", budget: int = 0, **inputs) -> str:
    """A graph's Autoregressive Extend through the FlowCache node; gives the node."""
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name=NETWORK, family="causal", weight_type="default")
    model = graph.add("FlowCache", model=(loaded, 0), preset=preset, history_budget=budget)
    positive = graph.add("FlowCacheDemoPrompt", caption="a red circle")
    negative = graph.add("FlowCacheDemoPrompt", caption="")
    settings = dict(chunks=chunks, steps=4, guidance=1.0, frames_per_chunk=2, lag=2, width=64, height=64)
    return graph.add(
        "FlowCacheAutoregressiveExtend",
        model=(model, 0), positive=(positive, 0), negative=(negative, 0), seed=seed, **settings | inputs,
    )  # fmt: skip


def plain(seed: int) -> Graph:
    graph = Graph()
    graph.add("SaveLatent", samples=(extend(graph, seed), 0), filename_prefix="soak")
    return graph


def guided(seed: int) -> Graph:
    graph = Graph()
    node = extend(graph, seed, chunks=4, preset="paper fast", budget=1, guidance=3.0)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
    return graph


def extended(seed: int) -> Graph:
    graph = Graph()
    begun = extend(graph, seed)
    graph.add("SaveLatent", samples=(extend(graph, seed + 1, state=(begun, 1)), 0), filename_prefix="soak")
    return graph


def host_path(seed: int) -> Graph:
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name=NETWORK, weight_dtype="default")
    model = graph.add("FlowCache", model=(loaded, 0), preset="balanced", history_budget=1)
    graph.add("SaveLatent", samples=(native(graph, (model, 0), seed=seed), 0), filename_prefix="soak")
    return graph


def unfit(seed: int) -> Graph:
    """A state that was made with other chunks."""
    graph = Graph()
    begun = extend(graph, seed)
    node = extend(graph, seed, state=(begun, 1), frames_per_chunk=1)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
    return graph


def kept(seed: int, chunks: int = 8, resume: bool = True, **inputs) -> Graph:
    """A run that is kept to be resumed and streamed to disk; without `resume` neither."""
    graph = Graph()
    if resume:
        vae = graph.add("FlowCacheLoadDemoVAE")
        stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="soak/v", fps=8.0, keep_latents=True)
        inputs |= {"resume": (graph.add("FlowCacheResume", limit_gb=1.0), 0), "stream": (stream, 0)}
    node = extend(graph, seed, chunks, preset="high", budget=2, steps=8, lag=8, **inputs)
    graph.add("FlowCacheReport", report=(node, 2))
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
    return graph


GOOD: tuple[Callable[[int], Graph], ...] = (plain, guided, extended, host_path)


def anew(graph: Graph, number: int) -> Graph:
    """The same prompt in the eyes of the model, another one in those of the host's cache."""
    for node in graph.values():
        if node["class_type"] == "FlowCacheDemoPrompt":
            node["inputs"]["caption"] += " " * number
    return graph


def latent(server: Server, outcome: Outcome) -> torch.Tensor:
    """What a prompt saved."""
    assert outcome.error is None, outcome.error["exception_message"]
    (node,) = (name for name in outcome.outputs if "latents" in (outcome.outputs[name] or {}))
    (file,) = server.saved(outcome, node)
    return load_file(file)["latent_tensor"]


def interrupted(server: Server, graph: Graph, after: int) -> Outcome:
    """Runs a graph and interrupts it after so many of the server's messages."""
    seen = 0

    def count(kind: str, data) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            server.post("/interrupt", {})

    return server.run(graph, on_event=count)


def wait_for(server: Server, prompts: list[str], seconds: float = 300) -> list[str]:
    """How queued prompts ended: "success" or "error", in their order."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        known = server.get("/history")
        if all(prompt in known for prompt in prompts):
            return [known[prompt]["status"]["status_str"] for prompt in prompts]
        time.sleep(0.2)
    raise TimeoutError(f"{len(prompts)} prompts did not end in {seconds} s.")
