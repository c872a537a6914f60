"""One step of a chunk along the flow. A solver object belongs to one chunk and holds what it must remember of it.

Convention: a latent at noise level sigma is (1 - sigma) * clean + sigma * noise; the velocity is its change with sigma,
noise - clean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .weights import lagrange, weighted

START = -1  # step number of the noise that a chunk begins with

Noise = Callable[[int], Tensor]  # step -> fresh unit noise of the chunk's shape


def no_noise(chunk: int, step: int) -> Tensor:
    """Stands where a run was given no source of fresh noise."""
    raise ValueError(f"Chunk {chunk} wants fresh noise at step {step}, but the run was given no source of it.")


class Solver(Protocol):
    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Gives the latent after `step`, from the latent before it and the velocity there; shapes [B, C, T, H, W]."""


SolverFactory = Callable[[Sequence[float], Noise], Solver]  # sigmas [steps + 1], fresh noise -> a chunk's solver


class Linear(ABC):
    """A solver whose step is a weighted sum of the latent, of what it remembers and of the velocity. So many of them in
    a row are one weighted sum too: see `along`.

    Args:
        sigmas: noise levels [steps + 1], falling; the last is 0 or small.
        noise: unused; solvers that add noise draw it here.

    Attributes:
        memory: tensors of the latent's shape from the steps before, oldest first. To go back, put older ones there.
    """

    def __init__(self, sigmas: Sequence[float], noise: Noise | None = None):
        self.sigmas = tuple(sigmas)
        self.memory: tuple[Tensor, ...] = ()

    @abstractmethod
    def weights(self, step: int, held: int, provisional: bool = False) -> np.ndarray:
        """Gives a step as a matrix [1 + tensors remembered after, 1 + held + 1]: the latent and the memory after it,
        from the latent, `held` remembered tensors and the velocity.

        Args:
            provisional: the velocity is a forecast, and the step will be taken again once more is known (but for the
                last such steps): what costs more than it tells may be left out.
        """

    def step(self, x: Tensor, velocity: Tensor, step: int, provisional: bool = False) -> Tensor:
        """Gives the latent after `step`, from the latent before it and the velocity there; shapes [B, C, T, H, W]."""
        return self._to(_step_weights(type(self), self.sigmas, step, len(self.memory), provisional), x, [velocity])

    def along(self, x: Tensor, velocities: Sequence[Tensor], steps: tuple[int, ...]) -> Tensor:
        """Gives the latent at the last of some steps, from the latent at the one before it in the list, with velocities
        from the line or parabola, over the step number, through those at the steps."""
        return self._to(_weights_along(type(self), self.sigmas, len(self.memory), steps), x, velocities)

    def _to(self, weights: Sequence[Sequence[float]], x: Tensor, velocities: Sequence[Tensor]) -> Tensor:
        before = (x, *self.memory, *velocities)
        after, *memory = [weighted(before, row) for row in weights]
        self.memory = tuple(memory)
        return after


@lru_cache(4096)
def _step_weights(kind: type[Linear], sigmas: tuple[float, ...], step: int, held: int, provisional: bool) -> list:
    return kind(sigmas).weights(step, held, provisional).tolist()


@lru_cache(4096)
def _weights_along(kind: type[Linear], sigmas: tuple[float, ...], held: int, steps: tuple[int, ...]) -> list:
    """Weights [1 + memory after, 1 + held + velocities] of `Linear.along`."""
    solver = kind(sigmas)
    state = np.eye(1 + held, 1 + held + len(steps))  # latent and memory, as sums of what there was and the velocities
    for step in range(steps[-2], steps[-1]):
        velocity = np.append(np.zeros(1 + held), lagrange(steps, step))
        state = solver.weights(step, len(state) - 1) @ np.vstack([state, velocity])
    return state.tolist()


class Euler(Linear):
    """First order: x moves along the velocity by the change of sigma."""

    def weights(self, step: int, held: int, provisional: bool = False) -> np.ndarray:
        return np.array([[1.0, self.sigmas[step + 1] - self.sigmas[step]]])


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


def chunk_noise(seed: int, chunk: int, shape: Sequence[int], step: int = START) -> Tensor:
    """Draws the unit noise of a chunk, float32 on the CPU: its start, or fresh noise for a step.

    It depends on nothing but the seed and the place, so a longer video begins like a shorter one, and an extension goes
    on like an unbroken run. A step's noise is the one that ComfyUI's own sampler draws (sample_ar_video).
    """
    place = (seed * 1_000_003 + chunk * 1009) if step == START else seed + chunk * 1000 + step
    generator = torch.Generator("cpu").manual_seed(place % 2**63)
    # Numbers come in another order for another type or place, and others may have changed what is usual.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
