"""One call from a file to what runs it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from flowcache_core.__main__ import main
from flowcache_core.checkpoints import Loaded, convert, load, load_backbone
from flowcache_core.demo import NETWORK_FILE
from flowcache_core.errors import UserError
from flowcache_core.models.longvie import LongVieBackbone, LongVieConfig, LongVieNetwork
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork, MagiText, grouped_attention
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from tests.helpers.magi_weights import SMALL, SMALL_FP8, SMALL_GATED, fill, normal
from tests.helpers.tiny import TINY, tiny_network

WIDE = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)
LATENT = normal("latent", (1, 4, 2, 4, 6))


def stored(folder: Path, tensors, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """A safetensors file, with settings of the transformer in its metadata."""
    metadata = {"config": json.dumps({"transformer": settings})} if settings else None
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return folder / "model.safetensors"


def magi(folder: Path, config=SMALL, dtype: torch.dtype = torch.float32) -> tuple[Path, MagiNetwork]:
    """A file of MAGI-1's layout, and the network that it was made from."""
    network = MagiNetwork(config, dtype)
    fill(network)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, folder / "magi.safetensors")
    return folder / "magi.safetensors", network


@torch.inference_mode()
def velocity(backbone, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a latent whose frames see each other and no history."""
    x, sigma = LATENT.to(dtype), torch.tensor([0.7])
    if isinstance(backbone, MagiBackbone):
        text = normal("text", (1, 5, backbone.config.caption_width)).to(dtype)
        context = backbone.context(MagiText(text, torch.ones(1, 5), step_size=1.0))
        residual = backbone.trunk(x, sigma, context, lambda layer, q, k, v: grouped_attention(q, k, v))
    else:
        context = backbone.context(normal("text", (1, 5, backbone.text_dim)).to(dtype))
        residual = backbone.trunk(x, sigma, context, lambda layer, q, k, v: F.scaled_dot_product_attention(q, k, v))
    result = backbone.head(x, sigma, residual)
    assert result.dtype == dtype
    return result


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To rounding, which may depend on where in memory the weights lie."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def close(loaded: Loaded, exact: torch.Tensor, most: float) -> bool:
    """Whether the loaded network's velocity differs from float32's, and by no more than a share of its size."""
    found = velocity(loaded.backbone, loaded.dtype).float()
    return 0 < (found - exact).norm() / exact.norm() < most


def test_wan_safetensors_with_settings_in_the_metadata(tmp_path):
    path = stored(tmp_path, tiny_network().state_dict(), num_heads=2, causal_ar=True)
    loaded = load_backbone(path)
    assert type(loaded.backbone) is WanBackbone
    assert (loaded.family, loaded.info.config) == ("causal", TINY)
    assert (loaded.dtype, loaded.device, loaded.special_tokens) == (torch.float32, torch.device("cpu"), None)
    assert (loaded.usual.steps, loaded.usual.fps, loaded.usual.attention) == (4, 16, "causal")
    assert same(velocity(loaded.backbone), velocity(WanBackbone(tiny_network())))
    assert load_backbone(path, "rolling").usual.attention == "rolling"


def test_self_forcings_torch_file(tmp_path):
    torch.manual_seed(0)
    network = WanNetwork(WIDE)
    averaged = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"generator": {"model.step": torch.ones(1)}, "generator_ema": averaged}, tmp_path / "model.pt")
    loaded = load_backbone(tmp_path / "model.pt")
    assert (loaded.family, loaded.info.config) == ("causal", WIDE) and "may be causal" in loaded.info.warnings[0]
    assert not load_backbone(tmp_path / "model.pt", "causvid").info.warnings
    assert same(velocity(loaded.backbone), velocity(WanBackbone(network)))


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_network_of_one_type_throughout_runs_in_it(dtype, most, tmp_path):
    exact = velocity(WanBackbone(tiny_network()))
    whole = stored(tmp_path, tiny_network().state_dict(), dtype, num_heads=2)
    loaded = load_backbone(whole, "causal")
    assert {tensor.dtype for tensor in loaded.backbone.network.state_dict().values()} == {loaded.dtype} == {dtype}
    assert close(loaded, exact, most)
    again = load_backbone(whole, "causal", dtype=torch.float32)
    assert again.dtype == torch.float32 and close(again, exact, most)


def test_plain_fp8_runs_in_bfloat16(tmp_path):
    matrices = {
        name: tensor.to(torch.float8_e4m3fn) if "blocks" in name and tensor.ndim == 2 else tensor
        for name, tensor in tiny_network().state_dict().items()
    }
    save_file(matrices, tmp_path / "fp8.safetensors", {"config": json.dumps({"transformer": {"num_heads": 2}})})
    loaded = load_backbone(tmp_path / "fp8.safetensors", "causal")
    assert loaded.info.dtype == torch.float8_e4m3fn and loaded.dtype == torch.bfloat16
    assert close(loaded, velocity(WanBackbone(tiny_network())), 0.3)


def test_skyreels_is_told_the_frame_rate(tmp_path):
    torch.manual_seed(0)
    path = stored(tmp_path, WanNetwork(replace(WIDE, fps=True)).state_dict())
    loaded, slow = load_backbone(path), load_backbone(path, fps=16)
    assert isinstance(loaded.backbone, SkyReelsBackbone)
    assert (loaded.family, loaded.backbone.fps, loaded.usual.fps) == ("skyreels", 24, 24)
    assert (slow.backbone.fps, slow.usual.fps) == (16, 16)
    assert not torch.allclose(velocity(loaded.backbone), velocity(slow.backbone), rtol=1e-3)


def test_the_model_that_ships():
    loaded = load_backbone(NETWORK_FILE)
    assert (loaded.family, loaded.dtype, loaded.usual.size) == ("demo", torch.float16, (64, 64))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are read from Linux's /proc")
def test_weights_stay_on_disk_where_nothing_is_asked(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "model.pt"
    torch.save({"generator": WanNetwork(WIDE).state_dict()}, file)

    def mapped(**options) -> bool:
        loaded = load_backbone(file, **options)  # kept while its maps are looked at
        place = loaded.backbone.network.head.head.weight.data_ptr()
        lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
        return any(int(line.split("-")[0], 16) <= place < int(line.split("-")[1], 16) for line in lines)

    assert mapped() and mapped(dtype=torch.float32) and not mapped(dtype=torch.bfloat16)


def test_magi_with_special_tokens_beside_it(tmp_path):
    path, network = magi(tmp_path)
    loaded = load_backbone(path)
    assert loaded.special_tokens is None and "special_tokens.npz" in loaded.info.warnings[-1]
    shapes = {"caption_token": (1, 48), "logo_token": (1, 48), "other_tokens": (100, 48)}
    np.savez(tmp_path / "special_tokens.npz", **{name: normal(name, shape).numpy() for name, shape in shapes.items()})
    loaded = load_backbone(path, "magi")
    assert loaded.special_tokens.other.shape == (100, 48) and not loaded.info.warnings
    assert (loaded.family, loaded.dtype, loaded.usual.steps, loaded.usual.lag) == ("magi", torch.float32, 64, 16)
    assert same(velocity(loaded.backbone), velocity(MagiBackbone(network)))
    inside = tmp_path / "converted.safetensors"
    convert(path, inside, "magi distilled", special_tokens=tmp_path / "special_tokens.npz")
    (tmp_path / "special_tokens.npz").unlink()
    loaded = load_backbone(inside)
    assert loaded.family == "magi distilled" and loaded.backbone.config.distilled
    assert loaded.special_tokens.other.shape == (100, 48)
    assert not same(velocity(loaded.backbone), velocity(MagiBackbone(network)))  # it is told the step size


def test_magi_runs_in_the_type_of_its_blocks(tmp_path):
    path, network = magi(tmp_path, dtype=torch.bfloat16)
    exact = velocity(load_backbone(path, "magi", dtype=torch.float32).backbone)
    loaded = load_backbone(path, "magi")
    assert loaded.dtype == loaded.backbone.network.dtype == torch.bfloat16
    assert loaded.backbone.network.rope.bands.dtype == torch.float32  # upstream keeps it so
    assert close(loaded, exact, 0.1)
    asked = load_backbone(path, "magi", dtype=torch.float32).backbone.network.videodit_blocks.layers[0]
    assert asked.mlp.linear_fc1.weight.dtype == torch.float32
    for wrong in (torch.float16, torch.int8):
        with pytest.raises(UserError, match="expected one of float32, bfloat16 for the family 'magi'"):
            load_backbone(path, "magi", dtype=wrong)


def test_quantised_magi_keeps_its_fp8_matrices(tmp_path):
    path, network = magi(tmp_path, SMALL_FP8, torch.bfloat16)
    loaded = load_backbone(path)
    assert (loaded.family, loaded.dtype) == ("magi distilled", torch.bfloat16)
    kept = loaded.backbone.network.videodit_blocks.layers[1].mlp.linear_fc1.weight
    assert kept.dtype == torch.float8_e4m3fn
    own = velocity(MagiBackbone(network), torch.bfloat16)
    assert (velocity(loaded.backbone, torch.bfloat16) - own).norm() < 0.02 * own.norm()


@pytest.mark.parametrize("family, steps", [("magi", 32), ("magi distilled", 16)])
def test_the_larger_magi_has_settings_of_its_own(family, steps, tmp_path):
    path, _ = magi(tmp_path, SMALL_GATED)
    usual = load_backbone(path, family, fps=12).usual
    assert (usual.steps, usual.lag, usual.size, usual.fps) == (steps, steps // 4, (1280, 720), 12)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"family": "cosmos"}, "family 'cosmos' is unknown; choose auto"),
        ({"family": "magi"}, "cannot be 'magi'; choose causal or"),
        ({"fps": 0}, "fps is 0, expected at least 1"),
        ({"dtype": torch.int8}, "type torch.int8 was asked for, expected one of float32, bfloat16, float16"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_what_is_asked_for_wrongly(options, words, tmp_path):
    path = stored(tmp_path, tiny_network().state_dict(), num_heads=2)
    refused(path, words, **options)


def test_files_that_do_not_run(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    tensors = dict(tiny_network().state_dict())
    scale = {"blocks.0.ffn.0.scale_weight": torch.ones(1)}
    refused(stored(tmp_path, tensors | scale, num_heads=2), r"scaled fp8 weights \(blocks.0.ffn.0.scale_weight\)")
    whole = stored(tmp_path, tensors, torch.int8, num_heads=2)
    refused(whole, "matrices of torch.int8, expected floats")
    broken = stored(
        tmp_path, tensors | {"head.head.bias": torch.full_like(tensors["head.head.bias"], torch.nan)}, num_heads=2
    )
    assert load_backbone(broken).family == "wan"
    refused(broken, "NaN or infinity in head.head.bias", check_finite=True)


def refused(path: Path, words: str, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(path, **options)
    assert "\n" not in str(caught.value)


LED = LongVieConfig(**vars(replace(WIDE, in_dim=12)), control_layers=1, image_dim=24)
CONTROL = "control_"


def longvie(folder: Path) -> LongVieNetwork:
    """The files that LongVie 2 comes in, with other attention in the base than upstream goes over it with."""
    network = LongVieNetwork(LED)
    fill(network)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    control = {f"pipe.dual_controller.{name}": one for name, one in weights.items() if name.startswith(CONTROL)}
    attention = {name: one for name, one in weights.items() if name.startswith("blocks.") and ".self_attn." in name}
    base = {name: one for name, one in weights.items() if not name.startswith(CONTROL)}
    folder.mkdir()
    save_file(base | {name: 2 * one for name, one in attention.items()}, folder / "base.safetensors")
    save_file(attention, folder / "dit.safetensors")
    save_file(control, folder / "control.safetensors")
    return network


def test_longvies_files_in_one_folder_are_one_network(tmp_path):
    network = longvie(tmp_path / "led")
    loaded = load_backbone(tmp_path / "led")
    assert loaded.family == "longvie" and loaded.info.config == LED and not loaded.info.warnings
    assert isinstance(loaded.backbone, LongVieBackbone)
    for name, expected in network.state_dict().items():
        assert torch.equal(loaded.backbone.network.state_dict()[name], expected), name
    info = convert(tmp_path / "led", tmp_path / "one.safetensors")
    assert info.family == "longvie" and info.config == LED
    again = load_backbone(tmp_path / "one.safetensors").backbone.network.state_dict()
    assert all(torch.equal(again[name], expected) for name, expected in network.state_dict().items())


def test_attention_is_that_of_the_base_where_longvie_brings_none(tmp_path):
    network = longvie(tmp_path / "led")
    (tmp_path / "led" / "dit.safetensors").unlink()
    loaded = load_backbone(tmp_path / "led").backbone.network.state_dict()
    name = "blocks.0.self_attn.q.weight"
    assert torch.equal(loaded[name], 2 * network.state_dict()[name])


def test_scales_of_replaced_weights_go_with_them(tmp_path):
    longvie(tmp_path / "led")
    base = load_file(tmp_path / "led" / "base.safetensors")
    names = [f"blocks.0.{part}.q.scale_weight" for part in ("self_attn", "cross_attn")]
    save_file(base | {name: torch.ones(()) for name in names}, tmp_path / "led" / "base.safetensors")
    _, tensors = load(tmp_path / "led")
    assert [name in tensors for name in names] == [False, True]


def test_info_says_what_longvie_takes(tmp_path, capsys):
    longvie(tmp_path / "led")
    assert main(["info", str(tmp_path / "led"), "--seconds", "10"]) == 0
    said = capsys.readouterr().out
    assert "longvie: LongVie 2" in said and "50 steps, lag 50, 21 latent frames a chunk" in said
    assert "640x352, 162 frames (10.1 s), 2 chunks" in said and "history   none" in said
