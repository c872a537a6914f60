"""Single tensors of GGUF files."""

import sys
from dataclasses import replace

import pytest
import torch

from flowcache_core.checkpoints.gguf_files import read_gguf
from flowcache_core.errors import UserError
from flowcache_core.models.skyreels import FRAME_RATE, add_frame_rate
from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.helpers.gguf_files import write_gguf

gguf = pytest.importorskip("gguf", reason="no gguf package: make test installs it")


@pytest.fixture
def weights():
    draw = torch.Generator().manual_seed(0)
    shapes = {"fps_embedding.weight": (2, 64), "fps_projection.0.weight": (64, 64), "fps_projection.0.bias": (64,)}
    shapes["blocks.0.ffn.0.weight"] = (128, 64)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize(("kind", "error"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2), ("Q5_1", 0.1)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_layers_come_back_as_they_were_packed(tmp_path, weights, kind, error, prefix):
    write_gguf(tmp_path / "a.gguf", weights, kind, prefix)
    found = read_gguf(tmp_path / "a.gguf", FRAME_RATE)
    assert set(found) == {name for name in weights if name.startswith("fps_")}
    for name, weight in found.items():
        assert weight.dtype == torch.float32 and weight.shape == weights[name].shape
        assert (weight - weights[name]).abs().max() <= error * weights[name].abs().max()


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, weights):
    write_gguf(tmp_path / "a.gguf", weights)
    broken = tmp_path / "b.gguf"
    for size in (0, 3, 40, 400):
        broken.write_bytes((tmp_path / "a.gguf").read_bytes()[:size])
        with pytest.raises(UserError, match="b.gguf is not a whole GGUF file"):
            read_gguf(broken, FRAME_RATE)


def test_without_the_package_it_is_told_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="ComfyUI-GGUF"):
        read_gguf(tmp_path / "a.gguf", FRAME_RATE)


def test_layers_beside_quantised_ones_are_floats():
    """A quantised layer's weight is bytes; what stands beside it is not."""
    config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=1, text_dim=64)
    network, whole = WanNetwork(config), WanNetwork(replace(config, fps=True))
    network.head.head.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    add_frame_rate(network, whole.state_dict())
    assert network.fps_embedding.weight.dtype == torch.float32
    assert torch.equal(network.fps_projection[2].weight, whole.fps_projection[2].weight)
