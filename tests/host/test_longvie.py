"""LongVie 2 through the nodes: equal to the engine alone, streamed and resumed chunk by chunk."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core import generate
from flowcache_core.demo.captions import embed_caption
from flowcache_core.demo.vae import load_vae
from flowcache_core.models.latent_spaces import WAN_21_MEAN, WAN_21_STD
from flowcache_core.models.longvie import Clips, LongVieBackbone, LongVieNetwork
from flowcache_core.settings import OFF, Settings, Spread
from tests.helpers.host.graph import Graph, fails, sample
from tests.helpers.host.longvie_models import FOLDER, SMALL, longvie_weights, write_longvie
from tests.helpers.host.videos import frames_of

STEPS, FRAMES, PICTURES = 6, 2, 5  # latent frames and pictures of a chunk
COLOURS = (0x2040C0, 0xC08020, 0x30A050)  # of the start, dense and sparse


@pytest.fixture(scope="module", autouse=True)
def file(server):
    write_longvie(server.base / "models" / "diffusion_models")


def led(graph: Graph, chunks: int) -> str:
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name=FOLDER, family="auto", weight_type="fp32")
    start, dense, sparse = (
        graph.add("EmptyImage", width=64, height=64, batch_size=count, color=colour)
        for count, colour in zip((1, chunks * PICTURES, chunks * PICTURES), COLOURS, strict=True)
    )
    return graph.add(
        "FlowCacheLongVieControl", model=(loaded, 0), vae=(graph.add("FlowCacheLoadDemoVAE"), 0),
        clip_vision=(graph.add("TestImageEncoder"), 0), start=(start, 0), dense=(dense, 0), sparse=(sparse, 0),
    )  # fmt: skip


def extend(graph: Graph, chunks: int = 2, preset: str = "off", video: int = 3, **inputs) -> str:
    """Extend over control videos for `video` chunks."""
    model = graph.add("FlowCache", model=(led(graph, video), 0), preset=preset, history_budget=0)
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    settings = dict(seed=4, chunks=chunks, steps=STEPS, guidance=3.0, frames_per_chunk=FRAMES, lag=-1)
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(model, 0), positive=(words[0], 0), negative=(words[1], 0),
        width=64, height=64, **settings | inputs,
    )  # fmt: skip


def picture(colour: int, count: int = 1) -> torch.Tensor:
    """What EmptyImage gives, [count, 64, 64, 3]."""
    parts = [(colour >> shift & 0xFF) / 0xFF for shift in (16, 8, 0)]
    return torch.tensor(parts).expand(count, 64, 64, 3)


def clips(video: int = 3) -> Clips:
    vae = load_vae()

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode_normalised(2 * pictures.movedim(-1, 0)[None] - 1)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return ((vae.decode_normalised(latent)[0].movedim(0, -1) + 1) / 2).clamp(0, 1)

    def features(image: torch.Tensor) -> torch.Tensor:
        spread = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(1))
        return spread * (1 + 4 * image.mean())

    start, *controls = COLOURS
    return Clips(
        encode, decode, features, picture(start)[0], [picture(one, video * PICTURES) for one in controls], FRAMES
    )


def alone(chunks: int = 2, settings: Settings = OFF) -> torch.Tensor:
    network = LongVieNetwork(SMALL)
    network.load_state_dict(longvie_weights())
    return generate(
        LongVieBackbone(network.eval().requires_grad_(False)), embed_caption("a red circle"), chunks,
        family_name="longvie", steps=STEPS, frames_per_chunk=FRAMES, seed=4, settings=settings, guidance_scale=3.0,
        negative=embed_caption(""), scenes=clips(),
    ).latents  # fmt: skip


def normalised(batch: torch.Tensor) -> torch.Tensor:
    """A batch of chunks in the host's space as one latent in the network's."""
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_21_MEAN, WAN_21_STD))
    return (torch.cat(batch.split(1), dim=2) - mean) / deviation


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("preset", ["off", "high"])
def test_nodes_equal_the_engine(server, preset):
    graph = Graph()
    batch = sample(server, graph, extend(graph, preset=preset))
    assert batch.shape == (2, 16, FRAMES, 8, 8)
    expected = alone(settings=OFF if preset == "off" else Settings(Spread(20 / 64, least=10)))
    assert error(normalised(batch), expected) < 2e-3


def test_chunks_go_on_from_a_state(server):
    graph = Graph()
    begun = extend(graph, chunks=1)
    whole = sample(server, graph, extend(graph, chunks=1, state=(begun, 1)))
    assert error(normalised(whole), alone()) < 2e-3


def test_a_streamed_run_is_written_chunk_by_chunk_and_resumed(server):
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="led/video", fps=16.0)
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    node = extend(graph, chunks=3, stream=(stream, 0), resume=(resume, 0), steps=20, seed=8)
    report = graph.add("FlowCacheReport", report=(node, 2))
    runs = server.base / "user" / "flowcache" / "runs"
    before = set(runs.glob("*/chunk-*"))

    def stop() -> None:
        while not set(runs.glob("*/chunk-*")) - before:
            time.sleep(0.01)
        server.post("/interrupt", {})

    threading.Thread(target=stop, daemon=True).start()
    assert server.run(graph).interrupted
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert "from an interrupted run" in outcome.outputs[report]["text"][0]
    resumed = load_file(server.saved(outcome, save)[0])["latent_tensor"]
    plain = Graph()
    assert torch.equal(sample(server, plain, extend(plain, chunks=3, steps=20, seed=8)), resumed)
    (video,) = (server.base / "output" / "led").glob("*.mp4")
    assert len(frames_of(video)) == 3 * PICTURES


def test_what_is_missing_or_does_not_go_is_said(server):
    graph = Graph()
    node = extend(graph, chunks=2, video=1)
    assert "dense control video has 5 frames, and chunk 1 needs 5 to 10" in fails(server, graph, node)
    graph = Graph()
    node = extend(graph)
    (flow,) = (one for one in graph.values() if one["class_type"] == "FlowCache")
    (loaded,) = (key for key, one in graph.items() if one["class_type"] == "FlowCacheLoadARVideoModel")
    flow["inputs"]["model"] = [loaded, 0]
    assert "connect LongVie Control" in fails(server, graph, node)
    graph = Graph()
    assert "attention auto" in fails(server, graph, extend(graph, attention="causal"))
    graph = Graph()
    model = graph.add("FlowCacheLoadARVideoModel", model_name="demo model (ships with FlowCache)", family="auto",
                      weight_type="default")  # fmt: skip
    node = led(graph, 1)
    graph[node]["inputs"]["model"] = [model, 0]
    graph.add("PreviewAny", source=(node, 0))
    assert "no control layers of LongVie 2" in fails(server, graph, node)
