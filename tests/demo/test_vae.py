"""The VAE's layout, its streaming, and the quality of the file that ships."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from flowcache_core.demo.clips import render, sample_scenes
from flowcache_core.demo.train_vae import HELD_OUT, export, fresh_vae, psnr
from flowcache_core.demo.vae import AT_ONCE, SHIPPED, CausalConv3d, Memory, Norm, WanVAE, load_vae


@pytest.fixture(scope="module")
def shipped():
    return load_vae()


@pytest.fixture(scope="module")
def video():
    return render(sample_scenes(1, np.random.default_rng(HELD_OUT)), 13)[..., :32, :32]


def test_keys_and_shapes_are_those_of_wan():
    state = {name: list(tensor.shape) for name, tensor in WanVAE(width=8).state_dict().items()}
    assert len(state) == 194
    assert state["encoder.conv1.weight"] == [8, 3, 3, 3, 3]
    assert state["encoder.downsamples.3.residual.2.weight"] == [16, 8, 3, 3, 3]
    assert state["encoder.downsamples.3.shortcut.weight"] == [16, 8, 1, 1, 1]
    assert state["encoder.downsamples.5.time_conv.weight"] == [16, 16, 3, 1, 1]
    assert state["encoder.downsamples.8.resample.1.weight"] == [32, 32, 3, 3]
    assert state["encoder.middle.0.residual.0.gamma"] == [32, 1, 1, 1]
    assert state["encoder.middle.1.norm.gamma"] == [32, 1, 1]
    assert state["encoder.head.2.weight"] == [32, 32, 3, 3, 3]
    assert state["conv1.weight"] == [32, 32, 1, 1, 1]
    assert state["conv2.weight"] == [16, 16, 1, 1, 1]
    assert state["decoder.upsamples.3.time_conv.weight"] == [64, 32, 3, 1, 1]
    assert state["decoder.upsamples.11.resample.1.weight"] == [8, 16, 3, 3]
    assert state["decoder.upsamples.14.residual.6.bias"] == [8]
    assert state["decoder.head.2.weight"] == [3, 8, 3, 3, 3]


@pytest.mark.parametrize("kernel", [3, (3, 1, 1), 1])
def test_a_convolution_on_the_processor_is_torchs(kernel):
    layer, x = CausalConv3d(4, 6, kernel), torch.randn(2, 4, 5, 7, 6)
    past = F.pad(x, (0, 0, 0, 0, layer.kernel_size[0] - 1, 0))
    expected = F.conv3d(past, layer.weight, layer.bias, padding=layer.padding)
    made = layer(x)
    assert made.shape == expected.shape and torch.allclose(made, expected, atol=1e-5)


def test_norms_are_of_the_channels_and_bear_nothing():
    x = torch.randn(2, 5, 3, 4, 4)
    x[:, :, 1] = 0.0
    x.requires_grad_()
    made = Norm(5)(x)
    assert torch.allclose(made, F.normalize(x, dim=1) * 5**0.5, atol=1e-6)
    made.square().sum().backward()
    assert x.grad.isfinite().all()


def test_a_whole_video_is_decoded_as_with_gradients(shipped):
    """Which a processor does in one go."""
    latent = torch.randn(1, 16, 2 * AT_ONCE + 1, 4, 4)
    whole = shipped.decode(latent)
    with torch.inference_mode():
        assert torch.allclose(shipped.decode(latent), whole, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunk_by_chunk_equals_whole(shipped, video, chunk):
    latent = shipped.encode(video)
    memory = Memory()
    streamed = torch.cat([shipped.decode(part, memory) for part in latent.split(chunk, dim=2)], dim=2)
    whole = shipped.decode(latent)
    assert streamed.shape == whole.shape == video.shape
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)


def test_nothing_looks_ahead(shipped, video):
    start = shipped.encode(video[:, :, :5])
    torch.testing.assert_close(start, shipped.encode(video)[:, :, :2], atol=1e-4, rtol=1e-4)


def test_both_latent_spaces_lead_to_the_same_pixels(shipped, video):
    clip = video[:, :, :5]
    raw = shipped.decode(shipped.encode(clip))
    normalised = shipped.decode_normalised(shipped.encode_normalised(clip))
    torch.testing.assert_close(raw, normalised, atol=1e-4, rtol=1e-4)


def test_the_shipped_file_is_small_and_good(shipped):
    assert SHIPPED.stat().st_size < 5e6
    clips = render(sample_scenes(4, np.random.default_rng(HELD_OUT + 1)), 9)
    assert psnr(shipped.decode(shipped.encode(clips)), clips) >= 27.0


def test_export_folds_wans_statistics_in(tmp_path, video):
    vae = fresh_vae(8).requires_grad_(False)
    export(vae.encoder.state_dict(), vae.decoder.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    clip = video[:, :, :5]
    latent = vae.encode(clip)
    torch.testing.assert_close(loaded.encode_normalised(clip), latent, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(loaded.decode_normalised(latent), vae.decode(latent), atol=2e-2, rtol=1e-2)
    with safe_open(tmp_path / "vae.safetensors", "pt") as file:
        assert set(file.keys()) == set(WanVAE(8).state_dict())


def test_a_wrong_video_or_file_is_explained(shipped, tmp_path):
    with pytest.raises(ValueError, match=r"1 \+ 4k frames"):
        shipped.encode(torch.zeros(1, 3, 4, 64, 64))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match="no Wan 2.1 VAE"):
        load_vae(tmp_path / "other.safetensors")
