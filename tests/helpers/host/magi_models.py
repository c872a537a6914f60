"""Small random MAGI-1 files: networks of all kinds, special tokens and autoencoder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from flowcache_core.models.magi.network import MagiNetwork
from flowcache_core.models.magi.text import SpecialTokens
from flowcache_core.models.magi.vae import MagiVae, MagiVaeConfig
from tests.helpers.magi_weights import SMALL, SMALL_FP8, SMALL_GATED, fill, normal

BASE = replace(SMALL, channels=16, caption_width=4096, caption_tokens=800)
CONFIGS = {
    "base": BASE,
    "distilled": replace(BASE, distilled=True),
    "fp8": replace(SMALL_FP8, channels=16, caption_width=4096, caption_tokens=800),
    "gated": replace(SMALL_GATED, caption_width=4096, caption_tokens=800, distilled=True),
}
VAE = {
    "_class_name": "ViTVAE",
    "ddconfig": {"embed_dim": 256, "depth": 1, "num_heads": 4, "mlp_ratio": 2, "z_chans": 16, "video_size": 64,
                 "conv_last_layer": True, "qkv_bias": True, "ln_in_attn": True},
}  # fmt: skip


def network_of(name: str) -> MagiNetwork:
    network = MagiNetwork(CONFIGS[name])
    fill(network, velocity=CONFIGS[name].input_scale / 3)
    return network.requires_grad_(False).eval()


def tokens() -> SpecialTokens:
    shapes = {"caption_token": (1, 4096), "logo_token": (1, 4096), "other_tokens": (17, 4096)}
    return SpecialTokens(*(normal(name, shape).half() for name, shape in shapes.items()))


def vae_alone() -> MagiVae:
    vae = MagiVae(MagiVaeConfig.from_upstream(VAE))
    fill(vae)
    return vae.requires_grad_(False).eval()


def write_network(name: str, folder: Path) -> None:
    """A network's file, with its special tokens beside it; left as it is where another test has written it."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    save_file(network_of(name).state_dict(), folder / "model.safetensors")
    special = tokens()
    np.savez(
        folder / "special_tokens.npz",
        caption_token=special.caption,
        logo_token=special.logo,
        other_tokens=special.other,
    )


def write_vae(folder: Path) -> None:
    """The autoencoder's folder as it is published."""
    folder.mkdir(parents=True)
    save_file(dict(vae_alone().state_dict()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(VAE))
