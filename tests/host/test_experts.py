"""Two networks by the noise level in the real host: Self-Forcing of Wan 2.2 A14B."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.demo.captions import embed_caption
from flowcache_core.models.experts import BOUNDARY, ExpertsBackbone
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from flowcache_core.settings import Compression, HistorySettings, Settings
from tests.helpers.host.graph import SMALL, Graph, fails, random_network, sample, write_network
from tests.host.test_families import normalised
from tests.host.test_long import fill, interrupt, resumed
from tests.host.test_longlive import report_of

CHUNKS = 4


@pytest.fixture(scope="module", autouse=True)
def files(server):
    fill(server.base)
    folder = server.base / "models" / "diffusion_models"
    for name, seed in (("high", 2), ("low", 3)):
        write_network(folder / f"{name}_noise.safetensors", random_network(seed), SMALL)
    wide = WanConfig(dim=192, ffn_dim=128, num_heads=2, num_layers=2, text_dim=SMALL.text_dim)
    write_network(folder / "wide_noise.safetensors", random_network(4, wide), wide)


def load(graph: Graph, name: str) -> tuple:
    node = graph.add(
        "FlowCacheLoadARVideoModel", model_name=f"{name}_noise.safetensors", family="experts", weight_type="fp32"
    )
    return node, 0


def both(graph: Graph, low: str = "low", boundary: float = BOUNDARY) -> tuple:
    high, other = load(graph, "high"), load(graph, low)
    return graph.add("FlowCacheTwoExperts", high_noise=high, low_noise=other, boundary=boundary), 0


def extend(graph: Graph, model: tuple, chunks: int = CHUNKS, **inputs) -> str:
    window = {"window_frames": 9, "sink_frames": 3}
    patched = graph.add("FlowCache", model=model, preset="off", history_budget=0, **window)
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    usual = {"seed": 4, "width": 64, "height": 64, "steps": 0, "guidance": 0.0, "lag": -1, "frames_per_chunk": 0}
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(words[0], 0), negative=(words[1], 0),
        chunks=chunks, **usual | inputs,
    )  # fmt: skip


def whole(server, chunks: int = CHUNKS, boundary: float = BOUNDARY, **inputs) -> torch.Tensor:
    graph = Graph()
    return sample(server, graph, extend(graph, both(graph, boundary=boundary), chunks, **inputs))


def engine(boundary: float = BOUNDARY) -> torch.Tensor:
    networks = [WanNetwork(SMALL), WanNetwork(SMALL)]
    for network, seed in zip(networks, (2, 3), strict=True):
        network.load_state_dict(random_network(seed))
        network.eval().requires_grad_(False)
    history = HistorySettings(window=9, compression=Compression("window", sink=3))
    return generate(
        ExpertsBackbone(*map(WanBackbone, networks), boundary), embed_caption("a red circle"), CHUNKS,
        family_name="experts", seed=4, settings=Settings(history=history),
    ).latents  # fmt: skip


@pytest.mark.parametrize("boundary", [BOUNDARY, 0.95])
def test_nodes_equal_the_engine(server, boundary):
    found, expected = normalised(whole(server, boundary=boundary)), engine(boundary)
    assert (found - expected).norm() / expected.norm() < 2e-3
    assert (found - engine(0.7)).norm() / expected.norm() > 1e-2


def test_the_report_counts_both_clean_passes(server):
    graph = Graph()
    text = report_of(server, graph, extend(graph, both(graph)))
    assert f"forwards: {CHUNKS * 10} of {CHUNKS * 10}" in text and "8 steps" in text


@pytest.mark.parametrize("cut", [1, 3])
def test_goes_on_from_a_state_to_the_same_bits(server, cut):
    graph = Graph()
    model = both(graph)
    begun = extend(graph, model, cut)
    found = sample(server, graph, extend(graph, model, CHUNKS - cut, state=(begun, 1)))
    assert torch.equal(found, whole(server))


def test_a_state_of_another_boundary_is_refused(server):
    graph = Graph()
    begun = extend(graph, both(graph), 1)
    node = extend(graph, both(graph, boundary=0.9), 1, state=(begun, 1))
    assert "another model" in fails(server, graph, node)


def test_an_interrupted_run_goes_on_to_the_same_bits(server):
    steps = {"steps": 20, "lag": 20}
    graph = Graph()
    keep = graph.add("FlowCacheResume", limit_gb=1.0)
    node = extend(graph, both(graph), 8, resume=(keep, 0), **steps)
    graph.add("FlowCacheReport", report=(node, 2))
    interrupt(server, graph)
    found, there = resumed(server, graph, node)
    assert 3 <= there < 8 and torch.equal(found, whole(server, 8, **steps))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda graph: both(graph, "wide"), "of other sizes"),
        (lambda graph: both(graph, "high"), "one model"),
    ],
    ids=["sizes", "twice"],
)
def test_networks_that_do_not_belong_together_are_refused(server, make, said):
    graph = Graph()
    model = make(graph)
    extend(graph, model)
    graph.add("SaveLatent", samples=(str(len(graph)), 0), filename_prefix="s")
    assert said in fails(server, graph, model[0])
