"""Krea Realtime in the real host: the first frame and the newest are run once more before every chunk."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.demo.captions import embed_caption
from flowcache_core.models.wan import WanBackbone, WanNetwork
from flowcache_core.settings import OFF
from tests.helpers.host.graph import SMALL, Graph, random_network, sample
from tests.host import test_longlive
from tests.host.test_families import normalised
from tests.host.test_long import interrupt, resumed
from tests.host.test_longlive import files as files  # the same network
from tests.host.test_longlive import report_of

TEXT, SWITCHED = "0-: a red circle", "0-1: a red circle\n2-: a blue square"


def extend(graph: Graph, text: str, chunks: int, **inputs) -> str:
    return test_longlive.extend(graph, text, chunks, family="krea", **{"steps": 5} | inputs)


def whole(server, chunks: int, text: str = TEXT, **inputs) -> torch.Tensor:
    graph = Graph()
    return sample(server, graph, extend(graph, text, chunks, **inputs))


def test_nodes_equal_the_engine_over_a_switch(server):
    network = WanNetwork(SMALL)
    network.load_state_dict(random_network(2))
    texts = [embed_caption(caption) for caption in ["a red circle"] * 2 + ["a blue square"] * 3]
    backbone = WanBackbone(network.eval().requires_grad_(False))
    expected = generate(backbone, texts, 5, family_name="krea", seed=4, settings=OFF)
    ours = normalised(whole(server, 5, SWITCHED))
    assert (ours - expected.latents).norm() / expected.latents.norm() < 2e-3


def test_the_report_tells_its_window(server):
    graph = Graph()
    text = report_of(server, graph, extend(graph, TEXT, 3))
    assert "history window 6 frames, sink 1" in text and "forwards: 17 of 17" in text


@pytest.mark.parametrize("keep", [True, False], ids=["all latents", "the newest alone"])
def test_goes_on_from_a_state_to_the_same_bits(server, keep):
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="krea/v", fps=8.0, keep_latents=keep)
    begun = extend(graph, TEXT, 4, stream=(stream, 0))
    node = extend(graph, TEXT, 2, state=(begun, 1))
    assert "as far as" not in report_of(server, graph, node)
    found = sample(server, graph, node)
    assert found.shape[2] == (18 if keep else 9)
    assert torch.equal(found, whole(server, 6)[:, :, -found.shape[2] :])


@pytest.mark.parametrize("keep", [True, False], ids=["all latents", "the newest alone"])
def test_an_interrupted_run_goes_on_to_the_same_bits(server, keep):
    graph = Graph()
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="krea/r", fps=8.0, keep_latents=keep)
    node = extend(graph, TEXT, 8, resume=(resume, 0), stream=(stream, 0), steps=20, lag=20, seed=5 + keep)
    graph.add("FlowCacheReport", report=(node, 2))
    interrupt(server, graph)
    found, there = resumed(server, graph, node)
    assert 3 <= there < 8
    assert found.shape[2] == (24 if keep else 3)
    assert torch.equal(found, whole(server, 8, steps=20, lag=20, seed=5 + keep)[:, :, -found.shape[2] :])
