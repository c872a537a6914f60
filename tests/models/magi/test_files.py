"""MAGI-1's files: base or distilled, special tokens and autoencoder, and the conversion of all of them."""

import json
import lzma
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowcache_core import __main__ as cli
from flowcache_core import checkpoints
from flowcache_core.checkpoints import magi_files
from flowcache_core.errors import UserError
from flowcache_core.models.magi.network import MagiNetwork, load_network
from tests.helpers.magi_vae import SETTINGS, VIDEO, codec
from tests.helpers.magi_weights import SMALL, SMALL_FP8, fill, normal


def weights(config=SMALL) -> dict[str, torch.Tensor]:
    network = MagiNetwork(config)
    fill(network)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.fixture
def network(tmp_path):
    save_file(weights(), tmp_path / "magi.safetensors")
    return tmp_path / "magi.safetensors"


@pytest.fixture
def tokens(tmp_path):
    shapes = {"caption_token": (1, 48), "logo_token": (1, 48), "other_tokens": (100, 48)}
    np.savez(tmp_path / "tokens.npz", **{name: normal(name, shape).numpy() for name, shape in shapes.items()})
    return tmp_path / "tokens.npz"


@pytest.fixture
def vae(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(dict(codec("heads").state_dict()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS["heads"]))
    return folder


def test_base_and_distilled_have_the_same_tensors_so_the_user_tells(network, tmp_path):
    info = checkpoints.inspect(network)
    assert (info.family, info.config, info.layout, info.dtype) == ("magi", SMALL, "magi", torch.float32)
    assert "choose magi distilled" in info.warnings[0]
    told = checkpoints.inspect(network, "magi distilled")
    assert told.config == replace(SMALL, distilled=True) and not told.warnings
    with pytest.raises(UserError, match="cannot be 'causal'; choose magi or magi distilled"):
        checkpoints.inspect(network, "causal")
    save_file(weights(SMALL_FP8), tmp_path / "fp8.safetensors")
    info = checkpoints.inspect(tmp_path / "fp8.safetensors")
    assert (info.family, info.config, info.warnings) == ("magi distilled", SMALL_FP8, ())


@pytest.mark.parametrize("distill", ["", ".distill"])
def test_upstreams_folders_tell_base_from_distilled(distill, tmp_path):
    inner = tmp_path / "4.5B" / f"inference_weight{distill}"
    inner.mkdir(parents=True)
    save_file(weights(), inner / "model.safetensors")
    for path in (tmp_path / "4.5B", inner, inner / "model.safetensors"):
        info = checkpoints.inspect(path)
        assert (info.family, info.warnings) == ("magi distilled" if distill else "magi", ())
    (tmp_path / "4.5B" / "inference_weight.fp8.distill").mkdir()
    with pytest.raises(UserError, match=r"inference_weight.fp8.distill.*expected one of them"):
        checkpoints.inspect(tmp_path / "4.5B")


def test_packed_shards_are_unpacked_once(tmp_path, monkeypatch):
    packed = tmp_path / "model.safetensors.zst"
    save_file(weights(), tmp_path / "plain")
    whole = (tmp_path / "plain").read_bytes()
    places = dict.fromkeys(weights(), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    packed.write_bytes(lzma.compress(whole, preset=0))
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="no package unpacks it: install zstandard"):
        checkpoints.inspect(tmp_path)
    monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(open=lzma.open, ZstdError=lzma.LZMAError))
    for broken in (lzma.compress(whole[:-9], preset=0), lzma.compress(whole, preset=0)[:-99], b"no such format"):
        packed.write_bytes(broken)
        with pytest.raises(UserError, match="cut short|does not unpack"):
            checkpoints.inspect(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
    packed.write_bytes(lzma.compress(whole, preset=0))
    assert checkpoints.load(tmp_path)[1].keys() == weights().keys()
    packed.unlink()
    assert checkpoints.inspect(tmp_path).family == "magi"


def test_tensors_that_do_not_fit(tmp_path):
    for change, words in (
        ({"rope.bands": None}, "lacks rope.bands and 0 more"),
        ({"rope.bands": torch.ones(3)}, r"rope.bands of shape \[3\], expected \[4\]"),
    ):
        tensors = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
        save_file(tensors, tmp_path / "broken.safetensors")
        with pytest.raises(UserError, match=words):
            checkpoints.load(tmp_path / "broken.safetensors")


def test_conversion_stamps_the_variant_and_takes_the_special_tokens_in(network, tokens, tmp_path, capsys):
    out = tmp_path / "out" / "converted.safetensors"
    command = ["convert", str(network), str(out), "--special-tokens", str(tokens)]
    assert cli.main(command) == 2 and "must be named" in capsys.readouterr().err
    assert cli.main([*command, "--family", "magi distilled"]) == 0
    info, tensors = checkpoints.load(out)
    assert info.config.distilled and not info.warnings
    found = magi_files.find_tokens(out, tensors)
    assert torch.equal(found.logo, normal("logo_token", (1, 48)).half())
    assert load_network(tensors, distilled=True).config == info.config
    for arguments, words in ((["--dtype", "bfloat16"], "float32"), (["--special-tokens", str(out)], "not MAGI-1's")):
        again = ["convert", str(network), str(tmp_path / "no.safetensors"), "--family", "magi", *arguments]
        assert cli.main(again) == 2 and words in capsys.readouterr().err
    assert cli.main(["info", str(out)]) == 0 and "width 192, 2 blocks, 6 heads" in capsys.readouterr().out


def test_special_tokens_beside_the_weights(network, tokens, tmp_path):
    assert magi_files.find_tokens(network, {}) is None
    tokens.rename(tmp_path / "special_tokens.npz")
    assert magi_files.find_tokens(network, {}).other.shape == (100, 48)
    assert magi_files.find_tokens(tmp_path, {}).other.shape == (100, 48)


def test_special_tokens_beside_upstreams_inner_folder(network, tokens, tmp_path):
    inner = tmp_path / "inference_weight"
    inner.mkdir()
    network.rename(inner / "model.safetensors")
    tokens.rename(tmp_path / "special_tokens.npz")
    for path in (tmp_path, inner, inner / "model.safetensors"):
        assert magi_files.find_tokens(path, {}).other.shape == (100, 48)
    (tmp_path / "special_tokens.npz").rename(inner / "special_tokens.npz")
    for path in (tmp_path, inner, inner / "model.safetensors"):
        assert magi_files.find_tokens(path, {}).other.shape == (100, 48)


def test_the_autoencoders_sizes(vae, tmp_path):
    expected = codec("heads", tile=256).encode(VIDEO[:, :, :4])
    file = vae / "diffusion_pytorch_model.safetensors"
    for path in (vae, file):
        assert magi_files.is_vae(path) and torch.equal(magi_files.read_vae(path).encode(VIDEO[:, :, :4]), expected)
    assert cli.main(["convert", str(vae), str(tmp_path / "vae.safetensors")]) == 0
    assert torch.equal(magi_files.read_vae(tmp_path / "vae.safetensors").encode(VIDEO[:, :, :4]), expected)
    (vae / "config.json").unlink()
    for path in (vae, file):
        with pytest.raises(UserError, match="Nothing says the sizes"):
            magi_files.read_vae(path)
