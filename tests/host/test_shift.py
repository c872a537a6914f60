"""Where the noise levels' shift is set: on Autoregressive Extend, by a node that patches the model, or nowhere."""

import pytest
import torch

from tests.helpers.host.graph import Graph, fails, random_network, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def made(server, patch: str = "", settings: dict | None = None, **inputs) -> tuple[torch.Tensor, str]:
    """A video, and the report's line on its shift."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
    if patch:
        model = graph.add(patch, model=model, **(settings or {})), 0
    node = extend(graph, model=model, **{"guidance": 2.0, "family": "wan", "steps": 6} | inputs)
    report = graph.add("FlowCacheReport", report=(node, 2))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    from safetensors.torch import load_file

    text = outcome.outputs[report]["text"][0]
    return load_file(server.saved(outcome, save)[0])["latent_tensor"], text


def test_a_patch_wins_over_the_family_and_the_widget_over_both(server):
    usual, told = made(server)
    assert "shift 8, the family's" in told
    patched, told = made(server, "ModelSamplingSD3", {"shift": 12.0})
    assert "shift 12, from the model's sampling patch" in told
    set_to, told = made(server, shift=12.0)
    assert "shift 12, as set" in told
    assert torch.allclose(patched, set_to, atol=1e-5) and (patched - usual).norm() / usual.norm() > 1e-2
    both, told = made(server, "ModelSamplingSD3", {"shift": 12.0}, shift=8.0)
    assert torch.allclose(both, usual, atol=1e-5) and "as set (the model's sampling patch says 12)" in told


def test_the_first_chunk_of_a_few_step_model_is_shifted_too(server):
    usual, _ = made(server, family="causal", steps=2)
    patched, _ = made(server, "ModelSamplingSD3", {"shift": 5.0}, family="causal", steps=2)
    more, _ = made(server, "ModelSamplingSD3", {"shift": 9.0}, family="causal", steps=2)
    assert torch.allclose(patched, usual, atol=1e-5)
    assert (more - usual)[:, :, :2].norm() / usual[:, :, :2].norm() > 1e-3


def test_other_kinds_of_sampling_patches(server):
    """Another scale of time-steps is not heeded and said; what is no flow is refused."""
    patched, told = made(server, "ModelSamplingAuraFlow", {"shift": 12.0})
    assert "shift 12, from the model's" in told and "from 0 to 1, and the network was trained on 0 to 1000" in told
    assert torch.allclose(patched, made(server, shift=12.0)[0], atol=1e-5)
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
    model = graph.add("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False), 0
    assert "sampled as no flow" in fails(server, graph, extend(graph, model=model))
