"""Another file name or frame rate writes the video again and samples nothing, as long as the latents are there."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.host.graph import Graph, random_network, write_network
from tests.helpers.host.videos import frames_of
from tests.host.test_extend import extend
from tests.host.test_native import guider_calls

SAID = "the video alone was written anew"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def run(server, given: bool = False, resume: bool = False, stream: dict | None = None, **inputs) -> tuple:
    """Guider calls that it took, the latents, the video's frames, and the report."""
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    settings = dict(filename_prefix="again/a", fps=8.0, keep_latents=True) | (stream or {})
    if given:
        image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000), 0
        latent = graph.add("VAEEncode", pixels=image, vae=vae), 0
        inputs |= dict(prefix=latent, end=latent)
    if resume:
        inputs["resume"] = graph.add("FlowCacheResume", limit_gb=1.0), 0
    node = extend(graph, stream=(graph.add("FlowCacheStreamVideo", vae=vae, **settings), 0), **inputs)
    report = graph.add("FlowCacheReport", report=(node, 2))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    before = guider_calls(server)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, node)
    latents = load_file(server.saved(outcome, save)[0])["latent_tensor"]
    return guider_calls(server) - before, latents, frames_of(file), outcome.outputs[report]["text"][0], file


def alike(frames: np.ndarray, others: np.ndarray) -> bool:
    """Frames of one video that was encoded for two frame rates."""
    return frames.shape == others.shape and np.abs(frames.astype(float) - others).mean() < 3


@pytest.mark.parametrize("given", [False, True])
def test_a_new_name_and_frame_rate(server, given):
    calls, latents, frames, report, file = run(server, given, seed=70, chunks=3)
    assert calls > 0 and SAID not in report
    for stream in (dict(filename_prefix="again/b"), dict(fps=24.0), dict(fps=12.0, filename_prefix="again/c")):
        again = run(server, given, seed=70, chunks=3, stream=stream)
        assert again[0] == 0 and SAID in again[3] and again[4] != file
        assert torch.equal(again[1], latents) and alike(again[2], frames)
        assert np.array_equal(again[2], frames) or "fps" in stream
    other = run(server, given, seed=71, chunks=3, stream=dict(fps=24.0))
    assert other[0] == calls and SAID not in other[3] and not torch.equal(other[1], latents)


def test_latents_that_were_not_kept_are_sampled_anew_and_it_is_said(server):
    stream = dict(keep_latents=False)
    calls, _, frames, report, _ = run(server, seed=72, chunks=3, stream=stream)
    assert "were not kept" not in report
    again = run(server, seed=72, chunks=3, stream=stream | dict(fps=24.0))
    assert again[0] == calls and "were not kept, so it was sampled anew" in again[3]
    assert alike(again[2], frames)


def test_with_resume_they_are_kept_on_disk(server):
    stream = dict(keep_latents=False)
    calls, _, frames, *_ = run(server, seed=73, chunks=3, lag=4, stream=stream, resume=True)
    again = run(server, seed=73, chunks=3, lag=4, stream=stream | dict(fps=24.0), resume=True)
    assert calls > 0 == again[0] and alike(again[2], frames)
