"""Loads the network that ships, and decodes its latents."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .. import checkpoints
from ..errors import UserError
from ..models.wan import WanBackbone
from .shipped import NETWORK_FILE
from .vae import Memory, load_vae


def load_network(path: Path | str = NETWORK_FILE) -> WanBackbone:
    """The demo network, or another file of the same family, ready to run in float32.

    Raises:
        UserError: no such file, or not a sound checkpoint of the demo's family.
    """
    info = checkpoints.inspect(path)
    if info.family != "demo":
        raise UserError(
            f"{Path(path).name} is of the family '{info.family}', expected 'demo': this command has no text encoder."
        )
    return cast(WanBackbone, checkpoints.load_backbone(path, dtype=torch.float32, check_finite=True).backbone)


def weights_name(backbone: WanBackbone) -> str:
    """What a state says it was made with."""
    return f"WanModel {backbone.dim}x{backbone.layers} heads {backbone.heads}"


def decode(latents: Tensor, chunk_frames: int) -> Tensor:
    """Latents [1, 16, T, h, w] of the demo network to pixels [3, 4T - 3, 8h, 8w] in [-1, 1], chunk by chunk."""
    vae, memory = load_vae(), Memory()
    with torch.inference_mode():
        parts = [vae.decode_normalised(chunk, memory)[0] for chunk in latents.split(chunk_frames, dim=2)]
    return torch.cat(parts, dim=1).clamp(-1, 1)
