"""Every widget of every node out of range, every link with the wrong thing: one clear line on the right node, the
server goes on, and the next good prompt is right to the bit."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.checkpoints import magi_files
from tests.helpers.host.comfy_server import Refused, Server
from tests.helpers.host.graph import Graph, random_network, write_network
from tests.helpers.host.magi_models import VAE, vae_alone
from tests.helpers.host.wrong_inputs import Wrong, links, widgets
from tests.host.soak import anew, latent, plain, prepare

HARMLESS = {  # unusual, and what they mean is clear
    "LATENT: odd size",
    "LATENT: one pixel",
    "LATENT: integers",
    "IMAGE: one pixel",
    "CONDITIONING: batch of three",
}
UNUSED = {("FlowCacheCalibrate", "negative"), ("FlowCacheReport", "latent")}  # by the rest of `everything`

SETTINGS = {"FlowCache", "FlowCacheARSampler", "FlowCacheStreamVideo", "FlowCacheResume"}  # act where they are used
LONG = {("FlowCacheCalibrate", name) for name in ("chunks", "minutes")}  # at their edge, which is in `everything`


def everything() -> Graph:
    """A prompt that has each node of the pack, as small as can be."""
    graph = Graph()
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name="any.safetensors", family="causal", weight_type="fp32")
    model = graph.add("FlowCache", model=(loaded, 0), preset="custom", history_budget=1)
    words = graph.add("FlowCachePromptsOverTime", text="0-: a red circle", clip=(graph.add("TestSmallT5"), 0))
    caption, negative = (graph.add("FlowCacheDemoPrompt", caption=text) for text in ("a red circle", ""))
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="any/stream", fps=16.0)
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    prefix = graph.add("EmptyARVideoLatent", width=32, height=32, length=5, batch_size=1)
    common = dict(positive=(caption, 0), negative=(negative, 0), seed=3, steps=2, width=32, height=32)
    chunks = dict(chunks=1, guidance=3.0, frames_per_chunk=1, lag=2)

    def extend(**more) -> str:
        return graph.add("FlowCacheAutoregressiveExtend", model=(model, 0), **common | chunks | more)

    made = extend(prefix=(prefix, 0), stream=(stream, 0), resume=(resume, 0))
    for node in (made, extend(state=(made, 1)), extend(end=(prefix, 0)), extend(video=(prefix, 0), strength=0.5)):
        graph.add("SaveLatent", samples=(node, 0), filename_prefix="any")
    graph.add("FlowCacheReport", report=(made, 2))
    graph.add("FlowCacheReport", model=(model, 0), latent=(made, 0))
    graph.add("PreviewAny", source=(words, 0))
    live = graph.add("FlowCacheLivePrompt", text="a red circle", blend=1, clip=(graph.add("TestSmallT5"), 0))
    graph.add("PreviewAny", source=(live, 0))
    images = graph.add("EmptyImage", width=32, height=32, batch_size=5, color=255)
    graph.add("FlowCacheSaveVideo", images=(images, 0), report=(made, 2), filename_prefix="any/saved", fps=16.0)
    video = graph.add("CreateVideo", images=(images, 0), fps=16.0)
    frames = graph.add("FlowCacheReadVideo", video=(video, 0))
    graph.add("FlowCacheCompareVideos", first=(images, 0), second=(frames, 0), view="wipe")
    windows = graph.add(
        "FlowCacheExtendInWindows", model=(loaded, 0), vae=(vae, 0), frames=9, window=5, overlap=1, guidance=3.0,
        start=(images, 0), **common,
    )  # fmt: skip
    graph.add("PreviewAny", source=(windows, 0))
    graph.add("FlowCacheCalibrate", model=(loaded, 0), vae=(vae, 0), chunks=1, minutes=0.0, **common | {"steps": 6})
    sampler = graph.add("FlowCacheARSampler", frames_per_chunk=1, lag=2, solver="euler")
    guider = graph.add("BasicGuider", model=(model, 0), conditioning=(caption, 0))
    noise = graph.add("RandomNoise", noise_seed=5)
    sigmas = graph.add("BasicScheduler", model=(model, 0), scheduler="simple", steps=2, denoise=1.0)
    sampled = graph.add(
        "SamplerCustomAdvanced", noise=(noise, 0), guider=(guider, 0), sampler=(sampler, 0), sigmas=(sigmas, 0),
        latent_image=(prefix, 0),
    )  # fmt: skip
    graph.add("PreviewAny", source=(sampled, 0))
    clip = graph.add("TestSmallT5")
    graph.add("PreviewAny", source=(graph.add("FlowCacheMagiPrompt", clip=(clip, 0), text="a horse"), 0))
    graph.add("PreviewAny", source=(graph.add("FlowCacheLoadMagiVAE", vae_name="any_magi.safetensors"), 0))
    return graph


WHOLE = everything()
KINDS = sorted({node["class_type"] for node in WHOLE.values() if node["class_type"].startswith("FlowCache")})


def feeds(graph: Graph, node: str) -> set[str]:
    """The node and what it needs."""
    linked = [value[0] for value in graph[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(feeds(graph, one) for one in linked))


def users(graph: Graph, node: str) -> set[str]:
    """The node and what runs with it: settings act where they are first used. A video's uses do not count."""
    if graph[node]["class_type"] == "FlowCacheAutoregressiveExtend":
        return {node} | {one for one in graph if graph[one]["inputs"].get("samples") == [node, 0]}
    direct = [one for one in graph if [node, 0] in graph[one]["inputs"].values()]
    first = {graph[one]["class_type"]: one for one in reversed(direct)}
    return {node}.union(*(users(graph, one) for one in first.values()))


def complaint(server: Server, node: str, wrong: Wrong) -> str | None:
    """What is not as it should be when a node of `WHOLE` gets a wrong input."""
    after = users(WHOLE, node)
    needed = set().union(*(feeds(WHOLE, one) for one in after))
    graph = Graph({name: deepcopy(WHOLE[name]) for name in WHOLE if name in needed})
    graph[node]["inputs"][wrong.name] = wrong.value
    if wrong.link:
        graph["wrong"] = {"class_type": "TestWrongObject", "inputs": {"name": wrong.link}}
        graph[node]["inputs"][wrong.name] = ["wrong", 0]
    try:
        error = server.run(graph, timeout=60).error
    except Refused as refused:
        blamed = set(json.loads(str(refused))["node_errors"])
        return None if blamed == {node} else f"the server blames {blamed or 'nobody'}: {str(refused)[:200]}"
    kind = graph[node]["class_type"]
    if error is None:
        harmless = wrong.may_run or wrong.link in HARMLESS or (kind, wrong.name) in UNUSED
        return None if harmless else "it ran"
    message = error["exception_message"].strip()
    if error["node_id"] not in (after if kind in SETTINGS else {node}):
        return f"{error['node_type']} is blamed: {message[:200]}"
    if not error["exception_type"].endswith("UserError") or "\n" in message:
        return f"{error['exception_type']} in {error['node_type']}: {message[:200]}"
    return None


def takes(node: str, wrong: Wrong) -> bool:
    """Whether to try a linked object there: it has that link, or is the first of its kind and has that widget."""
    first = next(one for one in WHOLE if WHOLE[one]["class_type"] == WHOLE[node]["class_type"])
    return wrong.name in WHOLE[node]["inputs"] or (wrong.widget and node == first)


@pytest.fixture(scope="module")
def expected(server) -> Iterator[torch.Tensor]:
    prepare(server)
    write_network(server.base / "models" / "diffusion_models" / "any.safetensors", random_network())
    stamp = {magi_files.STAMP: json.dumps(VAE)}
    save_file(dict(vae_alone().state_dict()), server.base / "models" / "vae" / "any_magi.safetensors", stamp)
    outcome = server.run(WHOLE)
    assert outcome.error is None, outcome.error["exception_message"]
    yield latent(server, server.run(plain(7)))
    server.post("/history", {"clear": True})  # the page cannot read a history with NaN in it


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_input_is_one_clear_line_on_its_node(server, expected, kind):
    info = server.get(f"/object_info/{kind}")[kind]
    objects = server.get("/object_info/TestWrongObject")["TestWrongObject"]["input"]["required"]["name"][0]
    nodes = [node for node in WHOLE if WHOLE[node]["class_type"] == kind]
    cases = [(nodes[0], wrong) for wrong in widgets(info, random.Random(kind)) if (kind, wrong.name) not in LONG]
    cases += [(node, wrong) for node in nodes for wrong in links(info, objects) if takes(node, wrong)]
    found = [f"{wrong}: {said}" for node, wrong in cases if (said := complaint(server, node, wrong))]
    assert not found, "\n".join(found)
    again = server.run(anew(plain(7), 1 + KINDS.index(kind)))
    assert len(again.executed) > 3 and torch.equal(latent(server, again), expected)
