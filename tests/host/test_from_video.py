"""Video to video in the real host: Autoregressive Extend, MAGI-1 too, and AR Sampler the host's own way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core.models.magi.vae import LATENT_SCALE
from tests.helpers.host.graph import Graph, fails, random_network, sample, write_network
from tests.helpers.host.magi_models import write_network as write_magi
from tests.host import test_magi as magi
from tests.host.test_extend import extend, flowcache
from tests.host.test_long import interrupt, resumed


@pytest.fixture(scope="module", autouse=True)
def files(server):
    folder = server.base / "models" / "diffusion_models"
    write_network(folder / "extend.safetensors", random_network())
    write_magi("base", folder / "magi_base")


def write_video(server, name: str, frames: int, height: int = 8, width: int = 8, scale: float = 1.0) -> torch.Tensor:
    latent = torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(5)) * scale
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": latent, **version}, server.base / "input" / f"{name}.latent")
    return latent


def given(graph: Graph, name: str) -> tuple:
    return graph.add("LoadLatent", latent=f"{name}.latent"), 0


def far(ours: torch.Tensor, others: torch.Tensor) -> float:
    assert ours.shape == others.shape
    return ((ours - others).norm() / others.norm()).item()


def test_strength_1_is_the_run_without_the_video_and_little_of_it_gives_the_video_back(server):
    video = write_video(server, "source", 6)

    def made(**inputs) -> torch.Tensor:
        graph = Graph()
        inputs |= {} if "strength" not in inputs else {"video": given(graph, "source")}
        return sample(
            server, graph, extend(graph, chunks=3, model=flowcache(graph, preset="off", history_budget=0), **inputs)
        )

    plain = made()
    assert torch.equal(made(strength=1.0), plain)
    found = [far(made(strength=strength), video) for strength in (0.002, 0.5)]
    assert found[0] < 0.1 and 0.3 < found[1], found
    assert far(made(strength=0.5), plain) > 0.1


def test_it_goes_on_at_its_own_place_from_a_state_and_the_report_says_so(server):
    write_video(server, "source", 8)
    graph = Graph()
    told = {"strength": 0.5, "video": given(graph, "source"), "seed": 11}
    model = flowcache(graph, preset="off", history_budget=0)
    whole = extend(graph, chunks=4, model=model, **told)
    begun = extend(graph, chunks=2, model=model, **told)
    rest = extend(graph, chunks=2, model=model, state=(begun, 1), **told)
    report = graph.add("FlowCacheReport", report=(rest, 2))
    saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="s") for node in (whole, rest)]
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    one, two = (load_file(server.saved(outcome, save)[0])["latent_tensor"] for save in saves)
    assert far(two, one) < 1e-4
    (text,) = outcome.outputs[report]["text"]
    assert "2 chunks of 2 steps" in text and "strength 0.5 begins at noise level" in text
    assert "one chunk runs after the other" not in text


@pytest.mark.parametrize(
    ("frames", "inputs", "words"),
    [
        (5, {}, "has 5 latent frames, and 3 chunks of 2 take 6: it is enough for 2 chunks"),
        (6, {"strength": 0.0}, "strength is 0, expected above 0 to 1"),
        (6, {"prefix": "wide"}, "bring them to one size"),
    ],
)
def test_what_does_not_fit(server, frames, inputs, words):
    write_video(server, f"of {frames}", frames)
    write_video(server, "wide", 2, width=12)
    graph = Graph()
    told = {name: given(graph, value) if name == "prefix" else value for name, value in inputs.items()}
    assert words in fails(server, graph, extend(graph, chunks=3, video=given(graph, f"of {frames}"), **told))


def test_an_interrupted_run_goes_on_and_one_of_another_strength_does_not_take_its_chunks(server):
    write_video(server, "long", 24)

    def graph_of(strength: float, **inputs) -> tuple[Graph, str]:
        graph = Graph()
        inputs = {name: (graph.add(node, **settings), 0) for name, (node, settings) in inputs.items()}
        node = extend(
            graph, chunks=8, steps=20, lag=20, seed=21, model=flowcache(graph, preset="off", history_budget=0),
            video=given(graph, "long"), strength=strength, **inputs,
        )  # fmt: skip
        graph.add("FlowCacheReport", report=(node, 2))
        return graph, node

    resume = {"resume": ("FlowCacheResume", {"limit_gb": 1.0})}
    plain = sample(server, *graph_of(0.5))
    graph, node = graph_of(0.5, **resume)
    interrupt(server, graph)
    other = sample(server, *graph_of(0.3, **resume))
    assert torch.equal(other, sample(server, *graph_of(0.3)))
    found, there = resumed(server, graph, node)
    assert 3 <= there < 8 and torch.equal(found, plain)


def test_magi(server):
    """From a frame of the video that is given, so that the first chunk begins with it."""
    video = write_video(server, "magi", 18, 4, 6, scale=1 / LATENT_SCALE)
    write_video(server, "first", 1, 4, 6, scale=1 / LATENT_SCALE)

    def made(strength: float, **inputs) -> torch.Tensor:
        graph = Graph()
        inputs = {name: given(graph, value) for name, value in inputs.items()}
        return sample(server, graph, magi.extend(graph, magi.load(graph), strength=strength, **inputs))

    plain = made(1.0)
    assert torch.equal(made(1.0, video="magi"), plain)
    nearly = made(0.001, video="magi", prefix="first")
    assert far(nearly[:, :, 1:], video[:, :, 1:]) < 0.05
    half = made(0.5, video="magi")
    assert far(half, plain) > 0.1 and far(half, video) > 0.1


def test_the_ar_sampler_takes_the_hosts_own_way(server):
    """The video as latent_image, and BasicScheduler's denoise."""
    video = write_video(server, "source", 6)

    def made(denoise: float) -> torch.Tensor:
        graph = Graph()
        model = flowcache(graph, preset="off", history_budget=0)
        positive = graph.add("FlowCacheDemoPrompt", caption="a red circle")
        sampled = graph.add(
            "SamplerCustomAdvanced",
            noise=(graph.add("RandomNoise", noise_seed=5), 0),
            guider=(graph.add("BasicGuider", model=model, conditioning=(positive, 0)), 0),
            sampler=(graph.add("FlowCacheARSampler", frames_per_chunk=2, lag=2, solver="euler"), 0),
            sigmas=(graph.add("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=denoise), 0),
            latent_image=given(graph, "source"),
        )
        return sample(server, graph, sampled)

    found = [far(made(denoise), video) for denoise in (0.005, 0.6)]
    assert found[0] < 0.1 and 0.3 < found[1], found
