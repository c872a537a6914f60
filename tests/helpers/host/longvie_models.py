"""A small LongVie 2 of random weights, in the files as they are published."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowcache_core.models.longvie import CONTROL, LongVieConfig, LongVieNetwork

SMALL = LongVieConfig(dim=96, ffn_dim=128, num_heads=2, num_layers=3, text_dim=64, control_layers=2)
USUAL = replace(SMALL, dim=256, num_heads=2, text_dim=4096)  # heads of 128 and a text as wide as every published one's
FOLDER = "LongVie2"


def longvie_weights(config: LongVieConfig = SMALL) -> dict[str, torch.Tensor]:
    """Of all three files together."""
    torch.manual_seed(3)
    found = {}
    for name, value in LongVieNetwork(config).state_dict().items():
        if value.ndim > 1:
            value = torch.randn_like(value) * 1.2 * value[0].numel() ** -0.5
        found[name] = torch.full_like(value, 1.3) if "norm_q" in name or "norm_k" in name else value
    return found


def write_longvie(networks: Path, config: LongVieConfig = SMALL) -> None:
    """Fills a folder of diffusion models; the base has other attention than LongVie's."""
    told = json.dumps({"transformer": {"num_heads": config.num_heads, "text_dim": config.text_dim}})
    folder, found = networks / FOLDER, longvie_weights(config)
    folder.mkdir(exist_ok=True)
    control = {name: weight for name, weight in found.items() if name.startswith(CONTROL)}
    attention = {name: weight for name, weight in found.items() if name.startswith("blocks.") and ".self_attn." in name}
    base = {name: weight for name, weight in found.items() if name not in control}
    save_file(
        base | {name: 2 * weight for name, weight in attention.items()}, folder / "base.safetensors", {"config": told}
    )
    save_file(attention, folder / "dit.safetensors")
    save_file(control, folder / "control.safetensors")
