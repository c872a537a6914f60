"""Adams-Bashforth of order 2: the plainest second-order multistep solver, for `fewer steps` and for converged runs."""

from collections.abc import Sequence

import torch
from torch import Tensor


class AdamsBashforth2:
    """x moves along the velocity extrapolated, through the last two, to the middle of the step.

    Args:
        sigmas: noise levels [steps + 1], falling.
        noise: unused.
    """

    def __init__(self, sigmas: Sequence[float], noise=None):
        self.sigmas = sigmas
        self.last: Tensor | None = None

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latent after `step`, from the latent before it and the velocity there; shapes [B, C, T, H, W]."""
        stride = self.sigmas[step + 1] - self.sigmas[step]
        middle = velocity
        if self.last is not None:
            middle = torch.lerp(self.last, velocity, 1.0 + 0.5 * stride / (self.sigmas[step] - self.sigmas[step - 1]))
        self.last = velocity
        return torch.add(x, middle, alpha=stride)

    coast = step
