"""Seeded weights for small MAGI-1 networks, large enough that a wrong position, mask or order shows in the output.

Every tensor is drawn from its own stream, seeded by its name, so the values do not depend on the order of parameters.
numpy's RandomState is used because its streams are frozen for ever.
"""

import zlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from flowcache_core.models.magi.config import MagiConfig
from tests.helpers.place import DEVICE

SMALL = MagiConfig(
    layers=2,
    width=192,
    ffn_width=256,
    heads=6,
    kv_heads=2,
    head_dim=32,
    channels=4,
    caption_width=48,
    caption_tokens=64,
)
SMALL_GATED = MagiConfig(
    layers=2, width=128, ffn_width=160, heads=8, kv_heads=2, head_dim=16, channels=16, caption_width=48,
    caption_tokens=64, doubled=True, input_scale=0.1, gated=True,
)  # fmt: skip
SMALL_FP8 = replace(SMALL, layers=3, distilled=True, fp8=True)


def normal(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Unit normal values of a shape, float32, from the stream of a name."""
    stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return torch.from_numpy(stream.standard_normal(shape).astype(np.float32)).to(DEVICE)


def fill(module: nn.Module, seed: int = 0, velocity: float = 1.0) -> None:
    """Overwrites all parameters of a MAGI-1 network or autoencoder.

    Args:
        velocity: factor on the network's output; 1 gives velocities of about 3 / input_scale, too wild for whole runs.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = normal(name, tuple(parameter.shape), seed)
            if name.endswith("bands"):
                parameter.copy_(parameter.float() * (1 + 0.3 * value))
            elif "_layernorm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.3 * value)  # a gain of 2: sharp attention
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_((0.0 if "post_norm" in name else 1.0) + 0.3 * value)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * value)
            elif name.endswith("_scale"):
                # One number, but for the scales of channels: inputs to about 50, matrices as they are.
                spread = 1 + 0.3 * value.abs() if "smooth" in name else 1.0
                parameter.fill_(1.0 if "weight" in name else 0.02).mul_(spread)
            elif parameter.ndim >= 2 and not name.endswith(("embedding", "pos_embed", "cls_token")):
                fan_in = value.shape[-1] if parameter.dtype == torch.float8_e4m3fn else value[0].numel()
                parameter.copy_(value * 1.5 / fan_in**0.5)
            else:
                parameter.copy_(value)
            if name == "final_linear.linear.weight":
                parameter.mul_(velocity)
