"""Steps split over two samplers (SplitSigmas, DisableNoise), as people do it with the host's own."""

import pytest
import torch

from tests.helpers.host.graph import Graph, custom, fails, native, random_network, sample, write_network

FRAMES, STEPS = 6, 8


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "split.safetensors", random_network())


def loaded(graph: Graph, **flowcache) -> tuple:
    model = graph.add("UNETLoader", unet_name="split.safetensors", weight_dtype="default"), 0
    return (graph.add("FlowCache", model=model, history_budget=0, **flowcache), 0) if flowcache else model


def sampler(graph: Graph, kind: str, chunk: int = FRAMES, lag: int = STEPS, **more) -> tuple:
    if kind == "host":
        return graph.add("KSamplerSelect", sampler_name="euler"), 0
    settings = dict(solver="euler", attention="causal") | more
    return graph.add("FlowCacheARSampler", frames_per_chunk=chunk, lag=lag, **settings), 0


def whole(graph: Graph, model: tuple, chosen: tuple) -> str:
    positive, negative = (graph.add("FlowCacheDemoPrompt", caption=text) for text in ("a red circle", ""))
    guider = graph.add("CFGGuider", model=model, positive=(positive, 0), negative=(negative, 0), cfg=3.0)
    noise = graph.add("RandomNoise", noise_seed=5)
    return custom(graph, model, (guider, 0), (noise, 0), chosen, FRAMES, STEPS)


def halves(graph: Graph, model: tuple, chosen: tuple, at: int = STEPS // 2) -> tuple[str, str]:
    """The sampling nodes of both halves."""
    first = whole(graph, model, chosen)
    inputs = graph[first]["inputs"]
    split = graph.add("SplitSigmas", sigmas=tuple(inputs["sigmas"]), step=at)
    inputs["sigmas"] = [split, 0]
    none = graph.add("DisableNoise")
    second = graph.add(
        "SamplerCustomAdvanced",
        **{name: tuple(inputs[name]) for name in ("guider", "sampler")},
        noise=(none, 0), sigmas=(split, 1), latent_image=(first, 0),
    )  # fmt: skip
    return first, second


def off(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(attention="joint"),
        dict(attention="joint", chunk=2, lag=0),
        dict(chunk=2, lag=0),
    ],
)
def test_both_halves_are_the_whole_run(server, settings):
    """And the half between them is what the host's own sampler hands on, where they see alike."""
    one, two = Graph(), Graph()
    expected = sample(server, one, whole(one, loaded(one), sampler(one, "ours", **settings)))
    first, second = halves(two, loaded(two), sampler(two, "ours", **settings))
    assert off(sample(server, two, second), expected) < 1e-5
    if settings.get("attention") == "joint" or not settings:
        host = Graph()
        theirs, _ = halves(host, loaded(host), sampler(host, "host"))
        assert off(sample(server, Graph(two), first), sample(server, host, theirs)) < 1e-5


def test_the_halves_may_be_of_either_sampler(server):
    one, two = Graph(), Graph()
    expected = sample(server, one, whole(one, loaded(one), sampler(one, "host")))
    _, second = halves(two, loaded(two), sampler(two, "host"))
    two[second]["inputs"]["sampler"] = list(sampler(two, "ours"))
    assert off(sample(server, two, second), expected) < 1e-5


def test_chunks_that_would_look_at_noise_are_refused(server):
    graph = Graph()
    first, second = halves(graph, loaded(graph), sampler(graph, "ours", chunk=2))
    graph.add("SaveLatent", samples=(second, 0), filename_prefix="s")
    assert "a chunk 0 that is not clean" in fails(server, graph, first)
    graph = Graph()
    first = native(graph, loaded(graph, preset="off"))
    split = graph.add("SplitSigmas", sigmas=tuple(graph[first]["inputs"]["sigmas"]), step=2)
    graph[first]["inputs"]["sigmas"] = [split, 0]
    assert "SamplerARVideo stores every chunk as clean" in fails(server, graph, first)


def test_what_is_forgotten_between_the_halves_is_said(server):
    graph = Graph()
    model = loaded(graph, preset="custom", every=2)
    first, second = halves(graph, model, sampler(graph, "ours", solver="unipc"))
    reports = [graph.add("FlowCacheReport", model=model, latent=(node, 0)) for node in (first, second)]
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    ended, begun = (outcome.outputs[report]["text"][0] for report in reports)
    assert "the noise levels end at 0.8" in ended and "none of it is kept as history" in ended
    assert "solver unipc and the forecast begin anew" in begun
    said = {key for key, text in outcome.texts if "begin anew" in text}
    assert said == {second}, outcome.texts
