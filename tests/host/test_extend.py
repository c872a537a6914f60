"""Autoregressive Extend in the real host: length, states, prefixes, caching, interrupt."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.host.graph import Graph, random_network, sample, write_network


@pytest.fixture(scope="module", autouse=True)
def network(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def extend(graph: Graph, caption: str = "a red circle", model: tuple | None = None, **inputs) -> str:
    if model is None:
        loaded = graph.add(
            "FlowCacheLoadARVideoModel", model_name="extend.safetensors", family="causal", weight_type="default"
        )
        model = (loaded, 0)
    positive = graph.add("FlowCacheDemoPrompt", caption=caption)
    negative = graph.add("FlowCacheDemoPrompt", caption="")
    settings = dict(seed=3, chunks=2, steps=4, guidance=1.0, frames_per_chunk=2, lag=4, width=64, height=64)
    return graph.add(
        "FlowCacheAutoregressiveExtend",
        model=model,
        positive=(positive, 0),
        negative=(negative, 0),
        **settings | inputs,
    )


def pixels(server, outcome, save: str) -> torch.Tensor:
    """What SaveImage wrote, [T, H, W, 3] in 0 to 255."""
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in server.saved(outcome, save)]
    return torch.from_numpy(np.stack(pictures)).int()


def flowcache(graph: Graph, **inputs) -> tuple:
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="extend.safetensors", family="causal", weight_type="default"
    )
    return graph.add("FlowCache", model=(loaded, 0), **inputs), 0


def test_a_longer_video_begins_like_a_shorter_one(server):
    short, long = Graph(), Graph()
    first = sample(server, short, extend(short, chunks=2))
    both = sample(server, long, extend(long, chunks=4))
    assert first.shape[2] == 4 and both.shape[2] == 8
    assert torch.allclose(both[:, :, :4], first, atol=1e-4)


def test_two_extensions_equal_one_run(server):
    """One chunk at a time, a state carries everything: no seam."""
    whole, parts = Graph(), Graph()
    expected = sample(server, whole, extend(whole, chunks=5))
    model = flowcache(parts, preset="off", history_budget=0)
    begun = extend(parts, chunks=2, model=model)
    ours = sample(server, parts, extend(parts, chunks=3, model=model, state=(begun, 1)))
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_a_window_counts_frames(server):
    """2 frames a chunk: a window of 6 with a sink of 2 is a budget of 2 chunks, the first of them kept."""

    def kept(**inputs) -> torch.Tensor:
        graph = Graph()
        model = flowcache(graph, preset="off", **inputs)
        return sample(server, graph, extend(graph, chunks=5, model=model))

    chunks = kept(history_budget=2, history_rule="window", keep_first_chunk=True)
    frames = kept(history_budget=0, window_frames=6, sink_frames=2)
    assert torch.equal(frames, chunks)
    assert not torch.equal(kept(history_budget=0, window_frames=6, sink_frames=1), chunks)
    relative = dict(history_budget=0, window_frames=6, sink_frames=2, positions="relative")
    assert not torch.equal(kept(**relative, sink_share=0.5), kept(**relative))


def test_two_captions_from_one_state(server):
    graph = Graph()
    model = flowcache(graph, preset="balanced", history_budget=1)
    begun = extend(graph, model=model)
    one = extend(graph, "a blue square", model=model, state=(begun, 1))
    other = extend(graph, "a green triangle", model=model, state=(begun, 1))
    saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="s") for node in (begun, one, other)]
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    from safetensors.torch import load_file

    start, left, right = (load_file(server.saved(outcome, save)[0])["latent_tensor"] for save in saves)
    assert torch.equal(left[:, :, :4], start) and torch.equal(right[:, :, :4], start)
    assert not torch.equal(left, right)


def test_changing_the_last_caption_reuses_the_states_before_it(server):
    def graph(caption):
        built = Graph()
        begun = extend(built)
        last = extend(built, caption, state=(begun, 1))
        built.add("SaveLatent", samples=(last, 0), filename_prefix="s")
        return built, begun, last

    server.run(graph("a blue square")[0])
    changed, begun, last = graph("a yellow square")
    outcome = server.run(changed)
    assert outcome.error is None
    assert last in outcome.executed and begun not in outcome.executed


def test_a_prefix_is_kept_and_continued(server):
    graph = Graph()
    begun = extend(graph, seed=8)
    node = extend(graph, prefix=(begun, 0), seed=9)
    save = graph.add("SaveLatent", samples=(begun, 0), filename_prefix="s")
    ours = sample(server, graph, node)
    assert ours.shape[2] == 8 and save
    graph = Graph()
    start = sample(server, graph, extend(graph, seed=8))
    assert torch.allclose(ours[:, :, :4], start, atol=1e-5)


def test_a_vae_decodes_all_frames_while_the_run_goes_on(server):
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    begun = extend(graph, seed=8)
    node = extend(graph, prefix=(begun, 0), seed=9, vae=vae)
    decoded = graph.add("VAEDecode", samples=(node, 0), vae=vae)
    saves = [graph.add("SaveImage", images=images, filename_prefix="s") for images in ((node, 4), (decoded, 0))]
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    ours, expected = (pixels(server, outcome, save) for save in saves)
    assert len(ours) == 4 * 8 - 3 and (ours - expected).abs().max() <= 1  # of 255


def test_frames_are_asked_for_with_something_to_decode_them_and_once(server):
    graph = Graph()
    graph.add("SaveImage", images=(extend(graph), 4), filename_prefix="s")
    assert "nothing decodes them: connect a vae" in server.run(graph).error["exception_message"]
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    stream = graph.add("FlowCacheStreamVideo", vae=vae, filename_prefix="s", fps=8.0), 0
    graph.add("SaveImage", images=(extend(graph, vae=vae, stream=stream), 4), filename_prefix="s")
    assert "Both a vae and a stream" in server.run(graph).error["exception_message"]


def test_a_lag_above_the_steps_is_told(server):
    graph = Graph()
    node = extend(graph, lag=30, seed=22)
    report = graph.add("FlowCacheReport", report=(node, 2))
    assert "lag is 30, above the 4 steps" in server.run(graph).outputs[report]["text"][0]


def test_progress_is_told_in_ticks_and_in_words(server):
    graph = Graph()
    node = extend(graph, chunks=3, steps=6, lag=2, seed=21)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert [value for value, most in outcome.progress if most == 2 * 2 + 6] == list(range(1, 11))
    words = [text for name, text in outcome.texts if name == node]
    assert "chunk 3 of 3" in words[-1] and "history" in words[-1] and outcome.previews > 0


def test_guidance_has_a_history_a_side(server):
    one, two = Graph(), Graph()
    weak = sample(server, one, extend(one, guidance=1.0))
    strong = sample(server, two, extend(two, guidance=4.0))
    assert torch.isfinite(strong).all() and not torch.allclose(weak, strong, atol=1e-2)


def test_interrupt_leaves_the_server_and_the_model_well(server):
    before = Graph()
    expected = sample(server, before, extend(before, chunks=3, seed=40))
    graph = Graph()
    node = extend(graph, chunks=2000, seed=41)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    threading.Thread(target=lambda: (time.sleep(3), server.post("/interrupt", {}))).start()
    assert server.run(graph).interrupted
    after = Graph()
    extra = extend(after, chunks=3, seed=40, guidance=1.0, steps=4)
    assert torch.equal(sample(server, after, extra), expected)
