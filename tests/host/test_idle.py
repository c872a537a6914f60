"""A cache that is on and reuses nothing says why, and what setting would, on the node and in the report."""

import pytest

from tests.helpers.host.graph import Graph, native, random_network, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


@pytest.mark.parametrize(
    "preset, settings, words",
    [
        ("custom", dict(every=4), "chunks start 5 ticks apart, which nothing from 2 to 4 divides; every 5 does"),
        ("custom", dict(every=5, warmup=30), "the warm-up of 30 leaves none of a chunk's 10 steps; warmup 9 does"),
        ("custom", dict(policy="flowcache", threshold=0.0), "the threshold is 0; one above"),
        ("quality", dict(quality=1.0), "reaches a quality of 1; quality 0."),
    ],
)
def test_extend(server, preset, settings, words):
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
    model = graph.add("FlowCache", model=loaded, preset=preset, history_budget=0, **settings), 0
    node = extend(graph, model=model, steps=10, lag=5)
    report = graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert words in outcome.outputs[report]["text"][0] and "0% of steps reused" in outcome.outputs[report]["text"][0]
    assert any(words in text for key, text in outcome.texts if key in (node, model[0]))


def test_the_hosts_sampler_and_a_window(server):
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
    model = graph.add("FlowCache", model=loaded, preset="balanced", history_budget=0), 0
    few, window = native(graph, model, steps=4), extend(graph, model=model, attention="joint", seed=2)
    reports = [
        graph.add("FlowCacheReport", model=model, latent=(few, 0)),
        graph.add("FlowCacheReport", report=(window, 2)),
    ]
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    told, other = (outcome.outputs[report]["text"][0] for report in reports)
    assert "recomputes 6 steps of a chunk, which takes 4; preset custom with every 2 does" in told
    assert "attention 'joint' runs every step of a window" in other
    assert any("preset custom" in text for key, text in outcome.texts if key == few)
