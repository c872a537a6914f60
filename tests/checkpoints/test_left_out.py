"""Tensors beside a network's own: what computes nothing is left out in one line, and what is needed stays."""

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.checkpoints import convert, inspect, load, load_backbone
from flowcache_core.errors import UserError
from flowcache_core.models.magi.network import MagiNetwork
from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.helpers.magi_weights import SMALL, fill

WIDE = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)


def wan() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(WanNetwork(WIDE).state_dict())


def magi() -> dict[str, torch.Tensor]:
    network = MagiNetwork(SMALL)
    fill(network)
    return dict(network.state_dict())


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"freqs": torch.zeros(1024, 64, dtype=torch.complex64)}, "computing nothing: freqs."),
        (
            {"blocks.0.self_attn.inv_freq": torch.zeros(4), "global_step": torch.ones(())},
            "computing nothing: blocks.0.self_attn.inv_freq, global_step.",
        ),
        ({"blocks.0.novelty.weight": torch.zeros(2)}, "beyond the Wan 2.1 layout: blocks.0.novelty.weight;"),
        (
            {f"{n}\n": torch.zeros(2) for n in "abcd"} | {"freqs": torch.ones(1)},
            "beyond the Wan 2.1 layout: a , b , c and 1 more;",
        ),
    ],
)
def test_of_wan(extra, words, tmp_path):
    save_file(wan() | extra, tmp_path / "model.safetensors")
    info, tensors = load(tmp_path / "model.safetensors", "causal")
    assert tensors.keys() == wan().keys()
    assert words in info.warnings[0] and len(info.warnings) == 1 and "\n" not in info.warnings[0]
    loaded = load_backbone(tmp_path / "model.safetensors", "causal")
    assert loaded.info.warnings == info.warnings
    convert(tmp_path / "model.safetensors", tmp_path / "clean.safetensors", "causal")
    assert not inspect(tmp_path / "clean.safetensors").warnings


def test_a_repackers_mark_tells_skyreels(tmp_path):
    """Kijai's files of SkyReels-V2 carry it, as a ComfyUI user's error report of it shows."""
    save_file(wan() | {"model_type.SkyReels-V2-DF-14B-720P": torch.zeros(1)}, tmp_path / "model.safetensors")
    info = inspect(tmp_path / "model.safetensors")
    assert info.family == "skyreels" and not info.guessed
    assert convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors").family == "skyreels"


def test_of_magi_which_upstream_loads_the_same_way(tmp_path):
    save_file(magi() | {"more": torch.ones(1)}, tmp_path / "magi.safetensors")
    loaded = load_backbone(tmp_path / "magi.safetensors", "magi")
    assert "beyond the MAGI-1 layout: more;" in loaded.info.warnings[0]


def test_what_is_missing_is_no_warning(tmp_path):
    tensors = wan() | {"freqs": torch.ones(1)}
    del tensors["blocks.1.ffn.2.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks blocks.1.ffn.2.bias"):
        inspect(tmp_path / "model.safetensors", "causal")
