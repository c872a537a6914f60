"""LongLive in the real host: where the prompt changes, the history is computed anew."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.demo.captions import embed_caption
from flowcache_core.models.families import FAMILIES
from flowcache_core.models.wan import WanNetwork
from flowcache_core.settings import Compression, HistorySettings, Settings
from tests.helpers.host.graph import SMALL, Graph, random_network, sample, write_network
from tests.host.test_families import normalised
from tests.host.test_long import fill, interrupt, resumed

SHOWN = "0-1: a red circle\n2-4: a blue square\n5-: a white triangle"
CAPTIONS = ["a red circle"] * 2 + ["a blue square"] * 3 + ["a white triangle"] * 2


@pytest.fixture(scope="module", autouse=True)
def files(server):
    fill(server.base)
    write_network(server.base / "models" / "diffusion_models" / "longlive.safetensors", random_network(2), SMALL)


def extend(graph: Graph, text: str, chunks: int, guidance: float = 1.0, family: str = "longlive", **inputs) -> str:
    model = graph.add("FlowCacheLoadARVideoModel", model_name="longlive.safetensors", family=family, weight_type="fp32")
    window = {"window_frames": 12, "sink_frames": 3} if family == "longlive" else {}
    patched = graph.add("FlowCache", model=(model, 0), preset="off", history_budget=0, **window)
    prompts = graph.add("FlowCachePromptsOverTime", text=text)
    against = graph.add("FlowCacheDemoPrompt", caption="")
    usual = {"seed": 4, "width": 64, "height": 64, "steps": 4, "lag": -1, "frames_per_chunk": 0}
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(prompts, 0), negative=(against, 0),
        chunks=chunks, guidance=guidance, **usual | inputs,
    )  # fmt: skip


def whole(server, text: str = SHOWN, chunks: int = 7, **inputs) -> torch.Tensor:
    graph = Graph()
    return sample(server, graph, extend(graph, text, chunks, **inputs))


def report_of(server, graph: Graph, node: str) -> str:
    report = graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    return outcome.outputs[report]["text"][0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_nodes_equal_the_engine(server, guidance):
    network = WanNetwork(SMALL)
    network.load_state_dict(random_network(2))
    expected = generate(
        FAMILIES["longlive"].backbone(
            network.eval().requires_grad_(False), 16, torch.nn.functional.scaled_dot_product_attention
        ),
        [embed_caption(caption) for caption in CAPTIONS], 7, family_name="longlive", seed=4, guidance_scale=guidance,
        settings=Settings(history=HistorySettings(window=12, compression=Compression("window", sink=3))),
        negative=embed_caption(""),
    )  # fmt: skip
    assert expected.report.rerun_for == [2, 5]
    ours = normalised(whole(server, guidance=guidance))
    assert (ours - expected.latents).norm() / expected.latents.norm() < 2e-3


def test_the_report_says_where(server):
    graph = Graph()
    assert "computed anew for the prompt of chunk 2, 5" in report_of(server, graph, extend(graph, SHOWN, 7))
    graph = Graph()
    assert "computed anew" not in report_of(server, graph, extend(graph, "0-: a red circle", 7))
    graph = Graph()
    assert "is not computed anew" in report_of(server, graph, extend(graph, SHOWN, 7, lag=2))


@pytest.mark.parametrize("keep", [True, False], ids=["all latents", "the newest alone"])
@pytest.mark.parametrize("cut", [2, 5])
def test_goes_on_from_a_state_with_another_prompt(server, cut, keep):
    """As if all had been one run, to the bit."""
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="longlive/v", fps=8.0, keep_latents=keep)
    begun = extend(graph, SHOWN, cut, stream=(stream, 0))
    found = sample(server, graph, extend(graph, SHOWN, 7 - cut, state=(begun, 1)))
    assert torch.equal(found, whole(server)[:, :, -found.shape[2] :])
    assert found.shape[2] == (21 if keep else 3 * (7 - cut) + min(3 * cut, 12))


def test_an_interrupted_run_goes_on_to_the_same_bits(server):
    text = SHOWN.replace("5-:", "5-6: a magenta square\n7-:")
    graph = Graph()
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    node = extend(graph, text, 9, resume=(resume, 0), steps=20, lag=20)
    graph.add("FlowCacheReport", report=(node, 2))
    interrupt(server, graph)
    found, there = resumed(server, graph, node)
    assert 3 <= there < 9
    assert torch.equal(found, whole(server, text, 9, steps=20, lag=20))
