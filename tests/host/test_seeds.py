"""The same seed gives the same video, whatever type its latent has and however that lies in memory."""

import pytest

from tests.helpers.host.graph import Graph, native, random_network, sample, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def video(graph: Graph, path: str, **latent) -> str:
    model = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
    model = graph.add("FlowCache", model=model, preset="off", history_budget=0), 0
    if path == "extend":
        prefix = sampled = extend(graph, model=model, seed=4)
        if latent:
            prefix = graph.add("TestLatentAs", samples=(sampled, 0), **latent)
        return extend(graph, model=model, prefix=(prefix, 0), condition_noise=0.1, seed=5)
    node = native(graph, model, steps=3)
    inputs = graph[node]["inputs"]
    if latent:
        inputs["latent_image"] = [graph.add("TestLatentAs", samples=tuple(inputs["latent_image"]), **latent), 0]
    if path == "ours":
        sampler = graph.add("FlowCacheARSampler", frames_per_chunk=2, lag=1000, solver="renoise")
        inputs["sampler"] = [sampler, 0]
    return node


@pytest.mark.parametrize("path", ["native", "ours", "extend"])
def test_type_and_layout_of_a_latent(server, path):
    plain = Graph()
    expected = sample(server, plain, video(plain, path))
    for dtype, last, within in (("float32", True, 1e-5), ("bfloat16", False, 2e-2), ("bfloat16", True, 2e-2)):
        graph = Graph()
        ours = sample(server, graph, video(graph, path, dtype=dtype, channels_last=last))
        assert (ours - expected).norm() / expected.norm() < within, (dtype, last)
