"""A start image before blocks of several frames: ARVideoI2V under SamplerARVideo, AR Sampler and ours."""

import pytest
import torch

from tests.helpers.host.graph import Graph, fails, native, random_network, sample, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "start.safetensors", random_network())


def video(graph: Graph, sampler: str, frames: int, block: int = 3, batch: int = 1, image: bool = True) -> str:
    """A sampling node: the host's own ("stock"), the host's with FlowCache ("native"), or AR Sampler ("ours")."""
    model = graph.add("UNETLoader", unet_name="start.safetensors", weight_dtype="default"), 0
    latent = (graph.add("EmptyARVideoLatent", width=64, height=64, length=4 * frames - 3, batch_size=batch), 0)
    if image:
        picture = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
        vae = (graph.add("FlowCacheLoadDemoVAE"), 0)
        made = graph.add(
            "ARVideoI2V", model=model, vae=vae, start_image=(picture, 0), width=64, height=64, length=4 * frames - 3,
            batch_size=batch,
        )  # fmt: skip
        model, latent = (made, 0), (made, 1)
    if sampler == "native":
        model = graph.add("FlowCache", model=model, preset="off", history_budget=0), 0
    node = native(graph, model, block=block)
    graph[node]["inputs"]["latent_image"] = list(latent)
    if sampler == "ours":
        chosen = graph.add("FlowCacheARSampler", frames_per_chunk=block, lag=1000, solver="renoise")
        graph[node]["inputs"]["sampler"] = [chosen, 0]
    return node


@pytest.mark.parametrize("frames", [7, 8, 10, 11])
@pytest.mark.parametrize("sampler", ["native", "ours"])
def test_equals_the_hosts_sampler(server, sampler, frames):
    """Whole blocks behind the image, and a last one of a single frame or of two."""
    stock, ours = Graph(), Graph()
    expected = sample(server, stock, video(stock, "stock", frames))
    node = video(ours, sampler, frames)
    result = sample(server, Graph(ours), node)
    assert result.shape == expected.shape and result.shape[2] == frames
    assert (result - expected).norm() / expected.norm() < 1e-4
    assert torch.allclose(result[:, :, :1], expected[:, :, :1], atol=1e-4)


@pytest.mark.parametrize("sampler", ["native", "ours"])
def test_a_short_last_chunk_without_an_image(server, sampler):
    stock, ours = Graph(), Graph()
    expected = sample(server, stock, video(stock, "stock", 5, image=False))
    result = sample(server, ours, video(ours, sampler, 5, image=False))
    assert (result - expected).norm() / expected.norm() < 1e-4


def chunked(graph: Graph, frames: int, steps: int = 6, **settings) -> str:
    """Chunks of 3 from noise that is each frame's own, whatever the length."""
    node = video(graph, "ours", frames, image=False)
    inputs = graph[node]["inputs"]
    inputs["noise"] = [graph.add("TestFrameNoise", seed=3), 0]
    graph[inputs["sampler"][0]]["inputs"] |= dict(solver="euler") | settings
    graph[inputs["sigmas"][0]]["inputs"]["steps"] = steps
    return node


def test_a_short_last_chunk_beside_active_ones(server):
    """Nobody looks at it, so the frames before it are those of a longer video; where all see all, it is as if there
    were no chunks."""
    short, long = Graph(), Graph()
    eight, nine = (sample(server, graph, chunked(graph, n, lag=2)) for graph, n in ((short, 8), (long, 9)))
    assert torch.allclose(eight[:, :, :6], nine[:, :, :6], atol=1e-4)
    assert not torch.allclose(eight[:, :, 6:], nine[:, :, 6:8], atol=1e-2)
    apart, whole = Graph(), Graph()
    ours = sample(server, apart, chunked(apart, 8, lag=0, attention="joint"))
    node = chunked(whole, 8)
    whole[node]["inputs"]["sampler"] = [whole.add("KSamplerSelect", sampler_name="euler"), 0]
    expected = sample(server, whole, node)
    assert (ours - expected).norm() / expected.norm() < 1e-5
    rolled = Graph()
    assert torch.isfinite(
        sample(server, rolled, chunked(rolled, 8, lag=1, attention="rolling", solver="renoise"))
    ).all()


def test_the_short_chunk_is_said(server):
    graph = Graph()
    node = video(graph, "native", 9)
    model = graph[graph[node]["inputs"]["guider"][0]]["inputs"]["model"]
    report = graph.add("FlowCacheReport", model=tuple(model), latent=(node, 0))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert "the last chunk has 2 of 3 latent frames; a length longer by 4 frames fills it" in str(
        outcome.outputs[report]["text"]
    )


@pytest.mark.parametrize("sampler", ["native", "ours"])
def test_a_batch_shares_the_image(server, sampler):
    graph, one = Graph(), Graph()
    both = sample(server, graph, video(graph, sampler, 4, batch=2))
    assert both.shape[0] == 2 and torch.isfinite(both).all()
    single = sample(server, one, video(one, sampler, 4))
    assert torch.allclose(both[:, :, :1], single[:, :, :1].expand(2, -1, -1, -1, -1), atol=1e-4)


@pytest.mark.parametrize("sampler", ["native", "ours"])
def test_an_image_that_fills_the_video(server, sampler):
    graph = Graph()
    assert "1 frames, and 1 of them are given" in fails(server, graph, video(graph, sampler, 1))


def test_extend_begins_with_the_image(server):
    """As if it were its prefix, which it is."""
    graph = Graph()
    node = video(graph, "native", 4)
    model, encoded = graph[graph[node]["inputs"]["guider"][0]]["inputs"]["model"], Graph(graph)
    ours = sample(server, graph, extend(graph, model=tuple(model), frames_per_chunk=3, lag=4))
    made = next(entry for entry in graph.values() if entry["class_type"] == "ARVideoI2V")["inputs"]
    prefix = encoded.add("VAEEncode", pixels=tuple(made["start_image"]), vae=tuple(made["vae"]))
    plain = encoded.add("UNETLoader", unet_name="start.safetensors", weight_dtype="default")
    expected = sample(server, encoded, extend(encoded, model=(plain, 0), frames_per_chunk=3, lag=4, prefix=(prefix, 0)))
    assert torch.allclose(ours, expected, atol=1e-4) and ours.shape[2] == 7
