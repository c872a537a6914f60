"""LongLive 2.0 in the real host: latents of 48 channels, shots by the prompt, a start image inside the first chunk."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core import generate
from flowcache_core.demo.captions import embed_caption
from flowcache_core.models.families import FAMILIES
from flowcache_core.models.latent_spaces import statistics_of
from flowcache_core.models.wan import WanNetwork
from flowcache_core.settings import Compression, HistorySettings, Settings
from tests.helpers.host.graph import SMALL, Graph, random_network, sample, write_network
from tests.host.test_long import fill, interrupt, resumed
from tests.host.test_longlive import report_of

DEEP = replace(SMALL, in_dim=48, out_dim=48)
CAPTIONS = ["a red circle"] * 2 + ["a blue square"] * 3
SHOTS = "0-1: a red circle\n2-: The scene transitions. a blue square"
WINDOW = {"window_frames": 32, "sink_frames": 8}


@pytest.fixture(scope="module", autouse=True)
def files(server):
    fill(server.base)
    write_network(server.base / "models" / "diffusion_models" / "longlive2.safetensors", random_network(2, DEEP), DEEP)


def extend(graph: Graph, text: str, chunks: int, **inputs) -> str:
    model = graph.add(
        "FlowCacheLoadARVideoModel", model_name="longlive2.safetensors", family="auto", weight_type="fp32"
    )
    patched = graph.add("FlowCache", model=(model, 0), preset="off", history_budget=0, **WINDOW)
    prompts = graph.add("FlowCachePromptsOverTime", text=text)
    against = graph.add("FlowCacheDemoPrompt", caption="")
    usual = {"seed": 4, "width": 64, "height": 64, "steps": 0, "guidance": 0.0, "lag": -1, "frames_per_chunk": 0}
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(prompts, 0), negative=(against, 0),
        chunks=chunks, **usual | inputs,
    )  # fmt: skip


def whole(server, text: str = SHOTS, chunks: int = 5, **inputs) -> torch.Tensor:
    graph = Graph()
    return sample(server, graph, extend(graph, text, chunks, **inputs))


def engine(captions: list[str], **more) -> torch.Tensor:
    """Latents of the same run by the engine, in the VAE's own scale."""
    network = WanNetwork(DEEP)
    network.load_state_dict(random_network(2, DEEP))
    attention = torch.nn.functional.scaled_dot_product_attention
    backbone = FAMILIES["longlive 2"].backbone(network.eval().requires_grad_(False), 24, attention)
    history = HistorySettings(window=32, compression=Compression("window", sink=8))
    result = generate(
        backbone, [embed_caption(each) for each in captions], len(captions), family_name="longlive 2", seed=4,
        latent_size=(4, 4), settings=Settings(history=history), **more,
    )  # fmt: skip
    mean, deviation = statistics_of(48)
    return result.latents * deviation + mean


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).norm() / expected.norm() < 2e-3)


def test_nodes_equal_the_engine_over_shots(server):
    found = whole(server)
    assert found.shape == (1, 48, 40, 4, 4)
    assert alike(found, engine(CAPTIONS, shots=(2,))) and not alike(found, engine(CAPTIONS))


def test_the_report_says_where_shots_begin(server):
    graph = Graph()
    text = report_of(server, graph, extend(graph, SHOTS, 4))
    assert "a new shot begins with chunk 2" in text and "4 chunks of 4 steps" in text
    graph = Graph()
    assert "new shot" not in report_of(server, graph, extend(graph, "0-: a red circle", 3))


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_goes_on_from_a_state_in_its_shot(server, cut):
    graph = Graph()
    begun = extend(graph, SHOTS, cut)
    assert torch.equal(sample(server, graph, extend(graph, SHOTS, 5 - cut, state=(begun, 1))), whole(server))


def test_an_interrupted_run_goes_on_to_the_same_bits(server):
    steps = {"steps": 20, "lag": 20}
    graph = Graph()
    keep = graph.add("FlowCacheResume", limit_gb=1.0)
    node = extend(graph, SHOTS, 7, resume=(keep, 0), **steps)
    graph.add("FlowCacheReport", report=(node, 2))
    interrupt(server, graph)
    found, there = resumed(server, graph, node)
    assert 3 <= there < 7 and torch.equal(found, whole(server, chunks=7, **steps))


def test_a_start_image_is_what_the_first_chunk_begins_with(server):
    graph = Graph()
    noise = torch.randn(1, 48, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    mean, deviation = statistics_of(48)
    tensors = {"latent_tensor": noise * deviation + mean, "latent_format_version_0": torch.tensor([])}
    save_file(tensors, server.base / "input" / "image.latent")
    image = graph.add("LoadLatent", latent="image.latent")
    found = sample(server, graph, extend(graph, "0-: a red circle", 2, prefix=(image, 0)))
    assert found.shape[2] == 16
    assert alike(found, engine(["a red circle"] * 2, prefix=noise))
