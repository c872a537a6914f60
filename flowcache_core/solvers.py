"""One step of a chunk along the flow. A solver object belongs to one chunk and holds what it must remember of it.

Convention: a latent at noise level sigma is (1 - sigma) * clean + sigma * noise; the velocity is its change with sigma,
noise - clean.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .schedule import CLEAN

Noise = Callable[[int], Tensor]  # step -> fresh unit noise of the chunk's shape


def no_noise(chunk: int, step: int) -> Tensor:
    """Stands where a run was given no source of fresh noise."""
    raise ValueError(f"Chunk {chunk} wants fresh noise at step {step}, but the run was given no source of it.")


class Solver(Protocol):
    """What it remembers is replaced at each step, never changed in place, so that a shallow copy is a point to return
    to."""

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latent after `step`, from the latent before it and the velocity there; shapes [B, C, T, H, W]."""
        ...

    def coast(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """As `step`, with a velocity that is a forecast. All but the last of those steps are taken again once more is
        known, so what costs more than it tells may be left out."""
        ...


SolverFactory = Callable[[Sequence[float], Noise], Solver]  # sigmas [steps + 1], fresh noise -> a chunk's solver


class Euler:
    """First order: x moves along the velocity by the change of sigma."""

    def __init__(self, sigmas: Sequence[float], noise: Noise):
        self.sigmas = sigmas

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        return torch.add(x, velocity, alpha=self.sigmas[step + 1] - self.sigmas[step])

    coast = step


class Renoise:
    """Few-step samplers: jump to the clean estimate, then noise it again with fresh noise (Self-Forcing, CausVid)."""

    adds_noise = True

    def __init__(self, sigmas: Sequence[float], noise: Noise):
        self.sigmas = sigmas
        self.noise = noise

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        clean = torch.sub(x, velocity, alpha=self.sigmas[step])
        level = self.sigmas[step + 1]
        return clean if level == 0 else (1.0 - level) * clean + level * self.noise(step)

    coast = step


def chunk_noise(seed: int, chunk: int, shape: Sequence[int], step: int = CLEAN) -> Tensor:
    """Unit noise of a chunk, on the CPU: its start, or fresh noise for a step.

    It depends on nothing but the seed and the place, so a longer video begins like a shorter one, and an extension goes
    on like an unbroken run. A step's noise is the one that ComfyUI's own sampler draws (sample_ar_video).
    """
    place = (seed * 1_000_003 + chunk * 1009) if step == CLEAN else seed + chunk * 1000 + step
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(place % 2**63))
