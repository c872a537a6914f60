"""What other nodes hang on a model has the effect on a chunk that it has on the host's own forward, or is named."""

import pytest
import torch

from tests.helpers.host.graph import Graph, custom, native, random_network, sample, write_network
from tests.host.test_extend import extend

FRAMES = 3
HEEDED = [
    "attn1_patch", "attn2_patch", "skipped block", "changed block", "attention", "block.forward", "self_attn.forward",
    "cross_attn.forward", "ffn.forward", "head.forward", "torch hook", "model function",
]  # fmt: skip
SKIPPED = dict(double_layers="1", single_layers="", start_percent=0.0, end_percent=1.0)
NODES = {
    "SkipLayerGuidanceDiT": dict(scale=3.0, rescaling_scale=0.0, **SKIPPED | {"end_percent": 0.6}),
    "SkipLayerGuidanceDiTSimple": SKIPPED,
    "ScaleROPE": dict(scale_x=0.5, shift_x=3.0, scale_y=1.5, shift_y=0.0, scale_t=0.7, shift_t=2.0),
    "CFGZeroStar": {},
}


@pytest.fixture(scope="module", autouse=True)
def files(server):
    folder = server.base / "models" / "diffusion_models"
    write_network(folder / "patched wan.safetensors", random_network(), causal_ar=None)
    write_network(folder / "patched causal.safetensors", random_network())


def model_of(graph: Graph, network: str, patch: str = "", first: bool = True, **flowcache) -> tuple:
    """A model with one patch, before or behind FlowCache."""
    model = graph.add("UNETLoader", unet_name=f"patched {network}.safetensors", weight_dtype="default"), 0
    if flowcache and not first:
        model = graph.add("FlowCache", model=model, history_budget=0, **flowcache), 0
    if patch in NODES:
        model = graph.add(patch, model=model, **NODES[patch]), 0
    elif patch:
        model = graph.add("TestPatched", model=model, kind=patch), 0
    if flowcache and first:
        model = graph.add("FlowCache", model=model, history_budget=0, **flowcache), 0
    return model


def sampled(graph: Graph, model: tuple, ours: bool = True, frames: int = FRAMES, steps: int = 6, **how) -> str:
    """All frames as one chunk, by the host's Euler or by AR Sampler."""
    positive, negative = (graph.add("FlowCacheDemoPrompt", caption=text) for text in ("a red circle", ""))
    guider = graph.add("CFGGuider", model=model, positive=(positive, 0), negative=(negative, 0), cfg=3.0)
    noise = graph.add("RandomNoise", noise_seed=5)
    settings = dict(frames_per_chunk=frames, lag=1000, solver="euler", attention="causal") | how
    kind = ("FlowCacheARSampler", settings) if ours else ("KSamplerSelect", dict(sampler_name="euler"))
    sampler = graph.add(kind[0], **kind[1])
    return custom(graph, model, (guider, 0), (noise, 0), (sampler, 0), frames, steps)


def off(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("attention", ["causal", "joint"])
@pytest.mark.parametrize("patch", [*HEEDED, *NODES])
def test_a_chunk_heeds_what_the_hosts_forward_heeds(server, patch, attention):
    plain, host, mine = Graph(), Graph(), Graph()
    unpatched = sample(server, plain, sampled(plain, model_of(plain, "wan"), ours=False))
    expected = sample(server, host, sampled(host, model_of(host, "wan", patch), ours=False))
    ours = sample(server, mine, sampled(mine, model_of(mine, "wan", patch), attention=attention, lag=0))
    assert off(ours, expected) < 1e-5
    assert off(expected, unpatched) > 1e-3


@pytest.mark.parametrize("patch", ["skipped block", "attention", "self_attn.forward", "SkipLayerGuidanceDiT"])
def test_a_causal_network_heeds_them_on_every_path(server, patch):
    """SamplerARVideo's own forward hands nothing to its blocks, so the two samplers are compared with each other."""
    host, mine = Graph(), Graph()
    expected = sample(server, host, sampled(host, model_of(host, "causal", patch), ours=False))
    assert off(sample(server, mine, sampled(mine, model_of(mine, "causal", patch))), expected) < 1e-5
    results = []
    for kind in ("native", "ours"):
        graph = Graph()
        node = native(graph, model_of(graph, "causal", patch, preset="off", first=kind == "ours"), cfg=3.0)
        if kind == "ours":
            chosen = graph.add("FlowCacheARSampler", frames_per_chunk=2, lag=1000, solver="renoise")
            graph[node]["inputs"]["sampler"] = [chosen, 0]
        results.append(sample(server, graph, node))
    assert off(*results) < 1e-5


@pytest.mark.parametrize("path", ["one by one", "staggered", "native"])
def test_a_later_call_sees_its_own_history_and_leaves_none(server, path):
    results, reports = [], []
    for patch in ("", "later call"):
        graph = Graph()
        model = model_of(graph, "causal", patch, preset="off")
        if path == "native":
            node = native(graph, model, cfg=3.0)
        else:
            node = extend(graph, model=model, chunks=3, steps=6, lag=6 if path == "one by one" else 2, guidance=3.0)
        report = graph.add("FlowCacheReport", model=model, latent=(node, 0))
        save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        reports.append(int(outcome.outputs[report]["text"][0].split("forwards: ")[1].split(" of")[0]))
        from safetensors.torch import load_file

        results.append(load_file(server.saved(outcome, save)[0])["latent_tensor"])
    assert off(*results) < 1e-5
    steps = 3 * (4 if path == "native" else 6)
    assert reports[0] == 2 * (steps + 3)  # two branches, and a clean pass a chunk
    assert reports[1] == reports[0] + 2 * steps  # and none for a later call in a clean pass


def test_skipped_layers_in_a_long_run(server):
    """Over several chunks, with reuse, and before or behind FlowCache: the same, and not as without."""
    made = {}
    for patch, first in (("SkipLayerGuidanceDiT", True), ("SkipLayerGuidanceDiT", False), ("", True)):
        graph = Graph()
        model = model_of(graph, "causal", patch, first=first, preset="custom", every=2)
        made[patch, first] = sample(server, graph, extend(graph, model=model, chunks=3, steps=8, lag=2, guidance=3.0))
    one, other, without = made.values()
    assert torch.equal(one, other) and off(one, without) > 1e-2


@pytest.mark.parametrize(
    "network, path, patch, words",
    [
        ("wan", "ours", "whole forward", "a patch of diffusion_model.forward_orig has no effect"),
        ("wan", "ours", "no place", "WanModel has no such place: attn1_output_patch, attn1 middle 0 0"),
        ("causal", "ours", "attn1_patch", "CausalWanModel has no such place: attn1_patch"),
        ("causal", "native", "attn1_patch", "CausalWanModel has no such place: attn1_patch"),
    ],
)
def test_what_is_not_heeded_is_said(server, network, path, patch, words):
    results = []
    for kind in ("", patch):
        graph = Graph()
        model = model_of(graph, network, kind, preset="off")
        node = native(graph, model) if path == "native" else sampled(graph, model)
        report = graph.add("FlowCacheReport", model=model, latent=(node, 0))
        save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        from safetensors.torch import load_file

        results.append(load_file(server.saved(outcome, save)[0])["latent_tensor"])
    assert words in outcome.outputs[report]["text"][0]
    assert any(words in text for key, text in outcome.texts if key == node)
    assert torch.equal(*results)
