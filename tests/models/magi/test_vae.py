"""MAGI-1's autoencoder against upstream's own modules (tests/golden/README.md says how the tensors were made)."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.errors import UserError
from flowcache_core.models.magi.vae import MagiVaeConfig, load_vae
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_vae import VIDEO, codec
from tests.helpers.magi_weights import normal
from tests.helpers.paths import GOLDEN_FOLDER

GOLDEN = load_file(GOLDEN_FOLDER / "magi_vae.safetensors")
LATENT = normal("latent", (1, 4, 5, 10, 13))


def thinned(video: torch.Tensor) -> torch.Tensor:
    """The pixels that the golden file holds."""
    return video[..., ::4, ::3]


@pytest.mark.parametrize("name", ["heads", "input"])
def test_encode(name):
    vae = codec(name)
    golden = GOLDEN[f"{name}.encoded"]
    assert relative_error(vae.encode(VIDEO), golden) < 1e-4
    assert relative_error(vae.encode(VIDEO[:, :, :1]), GOLDEN[f"{name}.encoded.one"]) < 1e-4
    assert relative_error(codec(name, tile=128).encode(VIDEO), golden) > 1e-2  # other tiles, other places


@pytest.mark.parametrize("name", ["heads", "input"])
def test_decode(name):
    vae = codec(name)
    golden = GOLDEN[f"{name}.decoded"]
    assert relative_error(thinned(vae.decode(LATENT)), golden) < 1e-4
    assert relative_error(thinned(vae.decode(LATENT[:, :, :1])), GOLDEN[f"{name}.decoded.one"]) < 1e-4
    assert relative_error(thinned(codec(name, tile_frames=8).decode(LATENT)), golden) > 1e-2


@pytest.mark.parametrize("name", ["heads", "input"])
def test_places_matter(name):
    vae = codec(name)
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            half.pos_embed[:, 1:] = half.pos_embed[:, 1:].flip(1)
    assert relative_error(vae.encode(VIDEO), GOLDEN[f"{name}.encoded"]) > 1e-2
    assert relative_error(thinned(vae.decode(LATENT)), GOLDEN[f"{name}.decoded"]) > 1e-2


@pytest.mark.parametrize("name", ["heads", "input"])
def test_bfloat16_is_near_the_float32_golden(name):
    vae = codec(name).bfloat16()
    assert relative_error(vae.encode(VIDEO.bfloat16()), GOLDEN[f"{name}.encoded"]) < 2e-2
    assert relative_error(thinned(vae.decode(LATENT.bfloat16())), GOLDEN[f"{name}.decoded"]) < 2e-2


def test_a_latent_frame_left_over_gives_four_pixel_frames():
    vae = codec("heads")
    assert vae.decode(LATENT[:, :, :4]).shape[2] == 16


def test_loading_over_a_checkpoints_tensors():
    made = codec("heads")
    tensors = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    loaded = load_vae(tensors, made.config)
    assert torch.equal(loaded.encode(VIDEO[:, :, :4]), codec("heads", tile=256).encode(VIDEO[:, :, :4]))
    assert loaded.decoder.cls_token.data_ptr() == tensors["decoder.cls_token"].data_ptr()
    with pytest.raises(UserError, match=r"pos_embed is \[1, 257, 256\], expected \[1, 1025, 256\]"):
        load_vae(tensors, replace(made.config, size=128))


def test_wrong_inputs_are_told():
    vae = codec("heads")
    with pytest.raises(UserError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 12, 60, 64))
    with pytest.raises(UserError, match="14 frames"):
        vae.encode(torch.zeros(1, 3, 14, 64, 64))
    with pytest.raises(UserError, match="ViTVAE"):
        MagiVaeConfig.from_upstream({"_class_name": "AutoencoderKL"})
    with pytest.raises(UserError, match="use_rope"):
        MagiVaeConfig.from_upstream({"_class_name": "ViTVAE", "ddconfig": {"use_rope": True}})
