"""Seeded weights for small networks of the Wan layout, the same in our module and in upstream's.

Every tensor is drawn from its own stream, seeded by its name, so the values do not depend on the order of parameters.
The scales make attention far from uniform, so that a wrong position or mask shows in the output, and the change of the
time embedding from step to step such that some steps of SkyReels-V2 are reused and some are not.
"""

import torch
from torch import Tensor, nn

from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.helpers.magi_weights import normal
from tests.helpers.place import DEVICE

SMALL = WanConfig(dim=96, ffn_dim=128, num_heads=3, num_layers=3, text_dim=24)
SMALL_FPS = WanConfig(dim=96, ffn_dim=128, num_heads=3, num_layers=3, text_dim=24, fps=True)
TEXT_TOKENS = 8


def value(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The weight of a parameter, float32, by its Wan 2.1 name; another seed gives another network."""
    drawn = normal(name, shape, seed)
    if "norm_q" in name or "norm_k" in name:
        return 1.6 + 0.3 * drawn  # a gain well above 1: sharp attention
    if name.endswith("norm3.weight"):
        return 1.0 + 0.3 * drawn
    if name.endswith("time_projection.1.bias"):
        return 0.5 * drawn
    if name.endswith("bias"):
        return 0.2 * drawn
    if name.endswith("modulation"):
        return 0.5 * drawn
    if name.endswith("fps_embedding.weight"):
        return drawn
    if name.endswith("time_projection.1.weight"):
        return 0.05 * drawn / drawn[0].numel() ** 0.5
    if name.startswith(("time_", "fps_")):
        return drawn / drawn[0].numel() ** 0.5
    if name.startswith("head."):
        return 0.5 * drawn / drawn[0].numel() ** 0.5
    return 1.2 * drawn / drawn[0].numel() ** 0.5


def fill(module: nn.Module, seed: int = 0) -> None:
    """Overwrites all parameters of a network with Wan 2.1's names."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value(name, tuple(parameter.shape), seed))


def network(config: WanConfig = SMALL, seed: int = 0) -> WanNetwork:
    made = WanNetwork(config).to(DEVICE)
    fill(made, seed)
    return made.eval().requires_grad_(False)


def text(branch: str, config: WanConfig = SMALL) -> Tensor:
    """Text embedding [1, tokens, width] of a branch."""
    return normal(f"text.{branch}", (1, TEXT_TOKENS, config.text_dim))
