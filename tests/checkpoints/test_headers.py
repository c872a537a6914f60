"""Every published file that the docs name is taken for what it is, from its names, shapes and types alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flowcache_core.checkpoints import STAMP, inspect
from flowcache_core.errors import UserError
from flowcache_core.models.longvie import LongVieConfig
from flowcache_core.models.magi.config import MAGI_4_5B, MAGI_24B
from flowcache_core.models.wan import WanConfig
from tests.helpers.headers import Header, stored, write_safetensors, write_shards, write_torch
from tests.helpers.paths import ROOT

WAN_5B = WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
WAN = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
SKYREELS = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, fps=True)
SKYREELS_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
LONGVIE = LongVieConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


def trained(path: Path, header: Header, config: dict) -> None:
    """As trainer/distillation.py of Self-Forcing and its kin saves: FSDP leaves its mark on the average's names."""
    prefixes = {"generator": "model.", "critic": "model.", "generator_ema": "model._fsdp_wrapped_module."}
    write_torch(path, header, prefixes)


def causvid(path: Path, header: Header, config: dict) -> None:
    """As causvid/train_distillation.py saves."""
    write_torch(path, header, {"generator": "model.", "critic": "model."})


def whole(path: Path, header: Header, config: dict) -> None:
    """As utils/inference_utils.py of LongLive 2.0 reads it into its wrapper; in bfloat16 by its name."""
    write_torch(path, {name: ("BF16", shape) for name, (_, shape) in header.items()}, {"generator": "model."})


def for_comfyui(path: Path, header: Header, config: dict) -> None:
    """With the metadata by which ComfyUI knows causal files."""
    write_safetensors(path, header, {"config": json.dumps({"transformer": {"causal_ar": True}})})


def marked_half(path: Path, header: Header, config: dict) -> None:
    """With the repacker's mark."""
    half = {name: ("F16", shape) for name, (_, shape) in header.items()}
    write_safetensors(path, half | {"model_type.SkyReels-V2-DF-14B-720P": ("F32", [1])})


def wrapped(path: Path, header: Header, config: dict) -> None:
    """As a wrapper's state is saved (Krea Realtime; its network is one with SkyReels-V2 14B's)."""
    write_safetensors(path, {f"model.{name}": part for name, part in header.items()})


def alone(path: Path, header: Header, config: dict) -> None:
    write_safetensors(path, header)


def folder(stem: str, shards: int) -> Callable[[Path, Header, dict], None]:
    """As Skywork and diffusers publish; shards are called as diffusers' converter asks for them, with no index."""

    def write(path: Path, header: Header, config: dict) -> None:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        write_shards(path, stem, shards, header) if shards > 1 else alone(path / f"{stem}.safetensors", header, config)

    return write


def led(path: Path, header: Header, config: dict) -> None:
    """With LongVie's two files beside the shards of Wan 2.1."""
    path.mkdir()
    write_shards(path, "diffusion_pytorch_model", 7, header)
    for part in LONGVIE_PARTS:
        alone(path / part, *stored(LONGVIE_PARTS[part]))


def magi(inner: str) -> Callable[[Path, Header, dict], None]:
    """In the folder that upstream's loader looks into."""

    def write(path: Path, header: Header, config: dict) -> None:
        (path / inner).mkdir(parents=True)
        alone(path / inner / "model.safetensors", header, config)

    return write


def converted(family: str) -> Callable[[Path, Header, dict], None]:
    """As `convert` writes it."""

    def write(path: Path, header: Header, config: dict) -> None:
        write_safetensors(path, header, {STAMP: json.dumps({"family": family})})

    return write


LONGVIE_PARTS = {"control.safetensors": "longvie_control", "dit.safetensors": "longvie_dit"}

# file or folder: its list in tests/headers, how it is written, family, sizes, whether the family stays a guess
FILES = {
    "Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors": ("skyreels_1_3b", alone, "skyreels", SKYREELS, False),
    "Wan2_1-SkyReels-V2-DF-14B-720P_fp16.safetensors": ("skyreels_14b", marked_half, "skyreels", SKYREELS_14B, False),
    "SkyReels-V2-DF-1.3B-540P": ("skyreels_1_3b", folder("model", 1), "skyreels", SKYREELS, False),
    "SkyReels-V2-DF-14B-540P": ("skyreels_14b", folder("model", 12), "skyreels", SKYREELS_14B, False),
    "SkyReels-V2-DF-14B-720P": ("skyreels_14b", folder("diffusion_pytorch_model", 6), "skyreels", SKYREELS_14B, False),
    "self_forcing_dmd.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "causal_forcing-framewise.safetensors": ("wan_1_3b", for_comfyui, "causal", WAN, False),
    "causal_forcing.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "framewise-2step.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "framewise-1step.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "longvideo.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "rolling_forcing_dmd.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "longlive_base.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "rewardforcing.pt": ("wan_1_3b", trained, "causal", WAN, True),
    "longlive_1.3b.safetensors": ("wan_1_3b", converted("longlive"), "longlive", WAN, False),
    "krea-realtime-video-14b.safetensors": ("skyreels_14b", wrapped, "wan", SKYREELS_14B, True),
    "model_bf16.pt": ("wan_5b", whole, "longlive 2", WAN_5B, False),
    "sfwan2.2_a14b_high_noise.safetensors": ("skyreels_14b", converted("experts"), "experts", SKYREELS_14B, False),
    "sfwan2.2_a14b_low_noise.safetensors": ("skyreels_14b", converted("experts"), "experts", SKYREELS_14B, False),
    "model.pt": ("wan_1_3b", causvid, "causal", WAN, True),  # CausVid's
    "causvid.pt": ("wan_1_3b", causvid, "causal", WAN, True),  # as the docs have it saved
    "magi1_4.5b_distill.safetensors": ("magi_4_5b", converted("magi distilled"), "magi distilled", MAGI_4_5B, False),
    "magi1_24b_distill.safetensors": ("magi_24b", converted("magi distilled"), "magi distilled", MAGI_24B, False),
    "4.5B_base": ("magi_4_5b", magi("inference_weight"), "magi", MAGI_4_5B, False),
    "4.5B_distill": ("magi_4_5b", magi("inference_weight.distill"), "magi distilled", MAGI_4_5B, False),
    "4.5B_distill_quant": (
        "magi_4_5b_quant", magi("inference_weight.fp8.distill"), "magi distilled", MAGI_4_5B, False,
    ),
    "24B_base": ("magi_24b", magi("inference_weight"), "magi", MAGI_24B, False),
    "24B_distill_quant": ("magi_24b_quant", magi("inference_weight.fp8.distill"), "magi distilled", MAGI_24B, False),
    "LongVie2": ("wan_i2v_14b", led, "longvie", LONGVIE, False),
    "diffusers SkyReels 1.3B": ("diffusers_skyreels_1_3b", folder("model", 1), "skyreels", SKYREELS, False),
    "diffusers SkyReels 14B": ("diffusers_skyreels_14b", folder("model", 12), "skyreels", SKYREELS_14B, False),
    "diffusers Wan": ("diffusers_wan_1_3b", folder("model", 2), "wan", WAN, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_what_it_is(name, tmp_path):
    listed, write, family, config, guessed = FILES[name]
    write(tmp_path / name, *stored(listed))
    info = inspect(tmp_path / name)
    assert (info.family, info.guessed) == (family, guessed)
    left_out = [warning for warning in info.warnings[guessed:] if "computing nothing" not in warning]
    assert not left_out
    if isinstance(config, WanConfig):
        assert info.config == config
    else:
        sizes = (config.layers, config.width, config.ffn_width, config.heads, config.gated, config.doubled)
        found = info.config
        assert (found.layers, found.width, found.ffn_width, found.heads, found.gated, found.doubled) == sizes
        assert (found.distilled, found.fp8) == (family == "magi distilled", "quant" in name)


@pytest.mark.parametrize("part", [*LONGVIE_PARTS, "base"])
def test_a_part_of_longvie_alone_says_what_is_missing(part, tmp_path):
    alone(tmp_path / f"{part}.safetensors", *stored(LONGVIE_PARTS.get(part, "wan_i2v_14b")))
    with pytest.raises(UserError, match=r"folder .*control\.safetensors|control\.safetensors .*folder"):
        inspect(tmp_path / f"{part}.safetensors")


def test_no_file_of_the_docs_is_missing_here():
    models = (ROOT / "docs" / "models.md").read_text().partition("The networks go to")[2].partition("## Settings")[0]
    named = {Path(name).name for name in re.findall(r"`([\w./-]+(?:\.pt|\.safetensors)|SkyReels-[\w.-]+)`", models)}
    assert len(named) > 8 and named - {"OUT.safetensors"} <= FILES.keys() | LONGVIE_PARTS.keys()
    magi_folders = set(re.findall(r"`(?:ckpt/magi/)?([\d.]+B_\w+)`", (ROOT / "docs" / "magi.md").read_text()))
    assert len(magi_folders) > 2 and magi_folders <= FILES.keys()
