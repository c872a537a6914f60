"""What rounding alone does to a run: the floor under every likeness, for a GPU computes in bfloat16."""

import copy
from dataclasses import replace

from torch import Tensor

from ..models.wan import WanBackbone
from .likeness import Spread, decibels, pixels
from .runs import Clips, Method, run
from .setups import Setup


class RoundedBackbone(WanBackbone):
    """A network whose weights and velocities are rounded to bfloat16; everything between is computed as before."""

    def __init__(self, backbone: WanBackbone):
        network = copy.deepcopy(backbone.network)
        for weight in network.parameters():
            weight.data = weight.data.bfloat16().to(weight.dtype)
        super().__init__(network, backbone.attention)

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the velocity [B, C, T, H, W], rounded."""
        velocity = super().head(x, sigma, residual)
        return velocity.bfloat16().to(velocity.dtype)


def rounding_floor(method: Method, setup: Setup, clips: Clips) -> Spread:
    """How alike a method's run is to itself, rounded, dB."""
    exact = run(method, setup, clips)
    rounded = run(method, setup, replace(clips, backbone=RoundedBackbone(clips.backbone)))
    return decibels(pixels(rounded.latents), pixels(exact.latents))
