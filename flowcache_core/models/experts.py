"""Two experts: networks of the Wan layout, of which the noise level says which one is run.

Wan 2.2 A14B has one network for the noisy part of a chunk's steps and one for the rest. In FastVideo's Self-Forcing of
it each expert attends to keys and values of its own making: a finished chunk goes through both at noise level 0.

Here the two are one backbone with the layers of both. A history has room for them all, those of the high-noise expert
first, so that memory plans, cuts, states and copies to a run's folder know nothing of experts; a forward runs the
layers of one, a clean pass those of one and then of the other (`stacks`). What is forecast from one expert's steps says
nothing of the other's, whose velocities are another function: a step at which the expert changes is recomputed, and
begins a new forecast.

The text's keys and values are the high-noise expert's, for both. So it is upstream: both experts are handed one cache
for the cross-attention, which the first forward fills, and that is one of the high-noise expert.

Source: FastVideo 0.2.1, fastvideo/pipelines/stages/causal_denoising.py (CausalDMDDenosingStage),
fastvideo/models/schedulers/scheduling_self_forcing_flow_match.py, fastvideo/configs/pipelines/wan.py
(SelfForcingWan2_2_T2V480PConfig).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.layers import Stack
from ..history.plan import NetworkSizes
from ..solvers import noise_levels
from ..solvers.one_step import Noise, Renoise
from .wan import Context, WanBackbone

BOUNDARY = 0.875  # the lowest noise level of the high-noise expert; a model's model_index.json may say another one
SHIFT = 12.0
EIGHT_STEPS = (1.0, 0.85, 0.7, 0.55, 0.35, 0.275, 0.2, 0.125, 0.0)  # before they are shifted; the experts have 4 each


def expert_levels(steps: int) -> list[float]:
    """Gives noise levels [steps + 1]: the published ones for 8 steps, else evenly spaced ones (of 4 steps, those that
    upstream's training names); shifted."""
    if steps == len(EIGHT_STEPS) - 1:
        return [noise_levels.shifted(level, SHIFT) for level in EIGHT_STEPS]
    return noise_levels.linear(steps, SHIFT)


def experts_sizes(one: NetworkSizes) -> NetworkSizes:
    """Says what decides how much memory a run of two experts takes, from the sizes of one."""
    return replace(one, layers=2 * one.layers, stacks=2)


class ExpertsRenoise(Renoise):
    """The high-noise expert says where a chunk is at the boundary, never where it is clean: its steps lead there and
    are noised anew from there to the next level. Its last one is left at the boundary, where the low-noise expert
    begins, though that is told its own first level. From then on as `Renoise`.

    Args:
        sigmas, noise: as for every solver.
        boundary: the lowest noise level of the high-noise expert; steps lead to the nearest level of training.
    """

    def __init__(self, sigmas: Sequence[float], noise: Noise, boundary: float = BOUNDARY):
        super().__init__(sigmas, noise)
        self.boundary = boundary
        (self.nearest,) = noise_levels.nearest_trained([boundary], SHIFT)

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        level, after = self.sigmas[step], self.sigmas[step + 1]
        if level < self.boundary or after == 0:
            return super().step(x, velocity, step)
        left = torch.sub(x, velocity, alpha=level - self.nearest)
        if after < self.boundary:
            return left
        clean = (1.0 - after) / (1.0 - self.nearest)
        return clean * left + sqrt(after**2 - (clean * self.nearest) ** 2) * self.noise(step)


@dataclass(frozen=True)
class ExpertsSolver:
    """Makes `ExpertsRenoise` for a boundary."""

    boundary: float = BOUNDARY
    adds_noise = True

    def __call__(self, sigmas: Sequence[float], noise: Noise) -> ExpertsRenoise:
        return ExpertsRenoise(sigmas, noise, self.boundary)


class ExpertsBackbone:
    """Runs chunks through two networks, one after the other.

    Args:
        high: runs the high-noise expert, whose texts both read.
        low: runs the low-noise expert, of the same sizes.
        boundary: the lowest noise level of the high-noise expert.

    Attributes:
        network: the modules of both.
        solver: what the family is sampled with, for this boundary.
    """

    def __init__(self, high: WanBackbone, low: WanBackbone, boundary: float = BOUNDARY):
        if high.sizes != low.sizes:
            raise ValueError(f"The experts have sizes {high.sizes} and {low.sizes}, expected the same.")
        self.high, self.low, self.boundary = high, low, boundary
        self.network = nn.ModuleList([high.network, low.network])
        self.solver = ExpertsSolver(boundary)
        self.layers = high.layers + low.layers
        self.heads, self.dim, self.head_dim, self.rotary = high.heads, high.dim, high.head_dim, high.rotary

    def stacks(self, sigma: float, clean: bool) -> list[Stack]:
        """Says whose layers a forward runs, and where they stand in the history.

        Args:
            sigma: noise level.
            clean: whether its keys and values are to be kept, for both experts.
        """
        high, low = Stack(self.high, 0), Stack(self.low, self.high.layers)
        if clean:
            return [high, low]
        return [high] if sigma >= self.boundary else [low]

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return experts_sizes(self.high.sizes)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.high.channels

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.high.text_dim

    @property
    def dtype(self) -> torch.dtype | None:
        """What texts must have; None where the networks' layers cast."""
        return self.high.dtype

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of one frame of latent size height x width."""
        return self.high.grid(height, width)

    def context(self, text: Tensor) -> Context:
        """Makes cross-attention keys and values of a text embedding [B, tokens, text_dim], which both experts read."""
        return self.high.context(text)

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches: one patch embedding at all noise levels."""
        return self.high.reuse_signal(x, sigma)

    def compile(self, **options: Any) -> None:
        """Compiles the blocks of both, see `wan.Compiled`."""
        for one in (self.high, self.low):
            one.compile(**options)
