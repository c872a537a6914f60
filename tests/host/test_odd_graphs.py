"""Graphs that are odd and possible end in one plain line, or run and say what they made of it."""

import pytest

from tests.helpers.host.graph import Graph, random_network, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def windows(graph: Graph, start: int = 0, **inputs) -> str:
    inner = Graph()
    settings = inner[extend(inner)]["inputs"]
    graph |= inner
    taken = {name: tuple(settings[name]) for name in ("model", "positive", "negative")}
    how = dict(seed=1, frames=25, window=13, overlap=5, width=64, height=64, steps=2, guidance=1.0, lag=0) | inputs
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    if start:
        how["start"] = graph.add("EmptyImage", width=64, height=64, batch_size=start, color=255), 0
    return graph.add("FlowCacheExtendInWindows", vae=vae, **taken, **how)


@pytest.mark.parametrize(
    "inputs, words",
    [
        (dict(frames=5, start=9), "its first 5 are those that the start ends with; set frames above 5"),
        (dict(frames=1, start=1), "its first 1 are those that the start ends with; set frames above 1"),
        (dict(window=5, overlap=9), "The overlap is 9 of a window's 5 frames"),
        (dict(lag=1, frames=33), "chunks of 12; make that window"),
    ],
)
def test_windows_are_told_in_frames_of_the_video(server, inputs, words):
    graph = Graph()
    node = windows(graph, **inputs)
    graph.add("PreviewImage", images=(node, 0))
    assert words in fails_on(server, graph, node)


def fails_on(server, graph: Graph, node: str) -> str:
    outcome = server.run(graph)
    assert outcome.error is not None and outcome.error["node_id"] == node
    assert outcome.error["exception_type"].endswith("UserError"), outcome.error["exception_message"]
    return outcome.error["exception_message"].strip()


def test_what_is_rounded_is_said(server):
    graph = Graph()
    node = windows(graph, frames=27, width=68)
    graph.add("PreviewImage", images=(node, 0))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    told = "\n".join(text for key, text in outcome.texts if key == node)
    assert "frames 27 is not of the form 4n + 1: 25 is taken" in told
    assert "width 68 is not of the form 8n: 64 is taken" in told


def test_a_noise_mask_on_given_frames(server):
    graph = Graph()
    begun = extend(graph, seed=8)
    mask = graph.add("SolidMask", value=1.0, width=64, height=64), 0
    masked = graph.add("SetLatentNoiseMask", samples=(begun, 0), mask=mask), 0
    node = extend(graph, prefix=masked, seed=9, width=70)
    report = graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    text = outcome.outputs[report]["text"][0]
    assert "the noise mask of the prefix has no effect" in text and "width 70 is not of the form 8n" in text
    assert any("noise mask of the prefix" in text for key, text in outcome.texts if key == node)
