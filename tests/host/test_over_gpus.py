"""FlowCache over GPUs in the real host, on the processor: the server and one or three workers, which meet over gloo."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.host.graph import Graph, custom, fails, native, random_network, sample, write_network
from tests.helpers.host.magi_models import write_network as write_magi
from tests.helpers.host.videos import frames_of
from tests.host.test_extend import extend
from tests.host.test_live import steering
from tests.host.test_magi import extend as magi_extend

FILE = "over_gpus.safetensors"
ENDED_WITHIN = 30  # seconds


@pytest.fixture(scope="module", autouse=True)
def files(server):
    weights = random_network()
    write_network(server.base / "models" / "diffusion_models" / FILE, weights)
    write_magi("base", server.base / "models" / "diffusion_models" / "over_gpus")
    name, wide = "blocks.0.self_attn.q.weight", weights["blocks.0.self_attn.q.weight"].shape
    torch.manual_seed(1)
    lora = {"lora_A.weight": torch.randn(2, wide[1]), "lora_B.weight": torch.randn(wide[0], 2)}
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    stem = f"diffusion_model.{name.removesuffix('.weight')}"
    save_file({f"{stem}.{kind}": value for kind, value in lora.items()}, folder / "over_gpus.safetensors")


def video(gpus: int, lora: bool = False, family: str = "causal", scheme: str = "auto", budget: int = 0, **inputs):
    """A graph and its Extend node; one GPU is the node left away."""
    graph = Graph()
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name=FILE, family=family, weight_type="default")
    model = (loaded, 0)
    if lora:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name="over_gpus.safetensors", strength_model=0.5), 0
    if gpus > 1:
        model = graph.add("FlowCacheOverGPUs", model=model, gpus=gpus, scheme=scheme), 0
    if budget:
        model = graph.add("FlowCache", model=model, preset="off", history_budget=budget), 0
    return graph, extend(graph, model=model, **inputs)


def workers(server) -> list[int]:
    """Process ids of the server's workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == server.process.pid and any(word.endswith("gpu_worker.py") for word in words):
            found.append(int(folder.name))
    return sorted(found)


def gone(server) -> bool:
    deadline = time.monotonic() + 10
    while workers(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not workers(server)


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def continued(gpus: int):
    """A graph whose second Extend goes on from the first one's state."""
    graph, first = video(gpus, guidance=3.0)
    model = tuple(graph[first]["inputs"]["model"])
    return graph, extend(graph, model=model, guidance=3.0, state=(first, 1))


def by_the_hosts_sampler(gpus: int):
    """A graph in which AR Sampler goes through the host's own nodes, and its sampling node."""
    graph, node = video(gpus)
    inputs = graph[node]["inputs"]
    model, positive, negative = (tuple(inputs[name]) for name in ("model", "positive", "negative"))
    guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=2.0)
    noise = graph.add("RandomNoise", noise_seed=5)
    sampler = graph.add("FlowCacheARSampler", frames_per_chunk=2, lag=4, solver="euler", attention="causal")
    return graph, custom(graph, model, (guider, 0), (noise, 0), (sampler, 0), frames=4, steps=4)


RUNS = {
    "plain": lambda gpus: video(gpus),
    "lora": lambda gpus: video(gpus, lora=True),
    "guidance": lambda gpus: video(gpus, guidance=3.0),
    "guidance, tokens alone": lambda gpus: video(gpus, guidance=3.0, scheme="ulysses"),
    "several active, budget": lambda gpus: video(gpus, chunks=4, lag=2, budget=1),
    "from a state": continued,
    "AR Sampler": by_the_hosts_sampler,
    "layers": lambda gpus: video(gpus, guidance=3.0, lag=2, scheme="pipeline"),
    "rolling": lambda gpus: video(gpus, family="rolling", lag=1),
    "joint": lambda gpus: video(gpus, family="skyreels", attention="joint", lag=1),
    "magi": lambda gpus: magi(gpus),
    "magi, layers": lambda gpus: magi(gpus, "pipeline"),
}
LONG = dict(chunks=24, seed=8)


def magi(gpus: int, scheme: str = "auto"):
    """A small MAGI-1's graph, and its Extend node."""
    graph = Graph()
    model = graph.add(
        "FlowCacheLoadARVideoModel", model_name="over_gpus/model.safetensors", family="magi", weight_type="default"
    )
    if gpus > 1:
        model = graph.add("FlowCacheOverGPUs", model=(model, 0), gpus=gpus, scheme=scheme)
    return graph, magi_extend(graph, (model, 0), chunks=2)


@pytest.fixture(scope="module")
def expected(server, files):
    """The videos of one GPU."""
    found = {name: sample(server, *run(1)) for name, run in RUNS.items()}
    found["long"] = sample(server, *video(1, **LONG))
    assert not workers(server)
    return found


@pytest.fixture(scope="module")
def worker(server, expected) -> int:
    """The process id of a worker that has made a run."""
    sample(server, *video(2))
    (found,) = workers(server)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_video_is_that_of_one(server, expected, worker, name):
    assert away(sample(server, *RUNS[name](2)), expected[name]) < 1e-5
    assert workers(server) == [worker]  # the one that was there


def test_patches_on_weights_reach_the_worker(expected):
    assert away(expected["lora"], expected["plain"]) > 1e-2


def test_chunks_arrive_as_with_one(server, worker):
    graph, node = video(2, chunks=3, frames_per_chunk=3, seed=10)
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="over/v", fps=8.0, keep_latents=True)
    graph[node]["inputs"]["stream"] = (stream, 0)
    graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert {value for value, most in outcome.progress if most == 12} == set(range(1, 13))
    assert outcome.previews >= 3
    assert any("chunk 3 of 3" in text for at, text in outcome.texts if at == node)
    (file,) = server.saved(outcome, node)
    assert len(frames_of(file)) == 33


def watched(server, graph, node: str, act, after: int):
    """Runs a graph, and does something when so many ticks are done; gives the outcome and how long it took from
    there."""
    done: list[float] = []

    def on_event(kind: str, data) -> None:
        if kind == "progress" and data["value"] >= after and not done:
            done.append(time.monotonic())
            act()

    graph.add("PreviewAny", source=(node, 2))
    outcome = server.run(graph, on_event=on_event)
    return outcome, time.monotonic() - done[0]


def test_an_interrupt_is_for_all_and_leaves_workers_for_the_next_run(server, expected, worker):
    outcome, took = watched(server, *video(2, chunks=40, seed=7), lambda: server.post("/interrupt", {}), 8)
    assert outcome.interrupted and took < ENDED_WITHIN
    assert away(sample(server, *video(2, **LONG)), expected["long"]) < 1e-5
    assert workers(server) == [worker]


def kept():
    graph, node = video(2, **LONG)
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    graph[node]["inputs"]["resume"] = (resume, 0)
    return graph, node


def test_a_killed_worker_ends_the_run_which_is_gone_on_from(server, expected, worker):
    outcome, took = watched(server, *kept(), lambda: os.kill(worker, signal.SIGKILL), 24)
    assert outcome.error and took < ENDED_WITHIN
    assert "Process 1 has ended (code -9), so all workers end" in outcome.error["exception_message"]
    graph, node = kept()
    report = graph.add("FlowCacheReport", report=(node, 2))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="test")
    again = server.run(graph)
    assert again.error is None, again.error["exception_message"]
    assert "chunks were there from an interrupted run" in again.outputs[report]["text"][0]
    assert "over 2 devices: ulysses" in again.outputs[report]["text"][0]
    assert away(load_file(server.saved(again, save)[0])["latent_tensor"], expected["long"]) < 1e-5


@pytest.mark.parametrize(
    ("gpus", "scheme", "patched", "words"),
    [
        (0, "auto", None, "start ComfyUI with --cpu and set gpus to 2"),
        (2, "branches", None, "one branch of guidance, and the scheme 'branches' divides two; take 'auto'"),
        (2, "auto", "attention", "also patched with: patches of its blocks or its attention; remove that"),
    ],
)
def test_what_cannot_be_divided_is_said(server, gpus, scheme, patched, words):
    graph = Graph()
    model = graph.add("FlowCacheLoadARVideoModel", model_name=FILE, family="causal", weight_type="default"), 0
    if patched:
        model = graph.add("TestPatched", model=model, kind=patched), 0
    divided = graph.add("FlowCacheOverGPUs", model=model, gpus=gpus, scheme=scheme)
    node = extend(graph, model=(divided, 0))
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="test")
    assert words in fails(server, graph, node if gpus else divided)


def test_a_sampler_of_the_whole_video_is_refused(server):
    graph = Graph()
    model = graph.add("FlowCacheLoadARVideoModel", model_name=FILE, family="causal", weight_type="default"), 0
    model = graph.add("FlowCacheOverGPUs", model=model, gpus=2, scheme="auto"), 0
    assert "Autoregressive Extend and AR Sampler" in fails(server, graph, native(graph, model))


def test_freed_memory_ends_workers(server):
    sample(server, *video(2, seed=9))
    assert workers(server)
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert gone(server)


@pytest.mark.parametrize("kind", ["causal", "longlive", "magi"])
def test_captions_that_change_reach_the_workers(server, kind):
    """A run over GPUs that is steered is what one GPU makes of the captions that it showed."""

    def steered(gpus: int, caption: str, **text) -> tuple[Graph, str]:
        graph = Graph()
        name = "over_gpus/model.safetensors" if kind == "magi" else FILE
        family = "auto" if kind == "magi" else kind
        model = graph.add("FlowCacheLoadARVideoModel", model_name=name, family=family, weight_type="default"), 0
        if gpus > 1:
            model = graph.add("FlowCacheOverGPUs", model=model, gpus=gpus, scheme="auto"), 0
        clip = {"clip": (graph.add("TestSmallT5"), 0)} if kind == "magi" else {}
        positive = graph.add(caption, **text, **clip), 0
        if kind == "magi":
            return graph, magi_extend(graph, model, positive=positive, chunks=4, steps=16)
        model = graph.add("FlowCache", model=model, preset="off", history_budget=2), 0
        node = extend(graph, model=model, chunks=4, steps=20, lag=20)
        graph[node]["inputs"]["positive"] = list(positive)
        return graph, node

    graph, node = steered(2, "FlowCacheLivePrompt", text="a red circle", blend=0)
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    shown = graph.add("PreviewAny", source=(node, 3))
    on_event, answers = steering(server, (1, {"text": "a blue square"}))
    outcome = server.run(graph, on_event=on_event)
    assert outcome.error is None, outcome.error["exception_message"]
    (text,) = outcome.outputs[shown]["text"]
    assert answers and text.endswith("-: a blue square") and not text.startswith("0-:")
    found = load_file(server.saved(outcome, save)[0])["latent_tensor"]
    assert away(found, sample(server, *steered(1, "FlowCachePromptsOverTime", text=text))) < 1e-5
