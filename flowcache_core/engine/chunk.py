"""An active chunk: all that is known of it while it is denoised, in one object that is dropped when it is finished."""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..reuse.forecast import Corrector, Forecast
from ..solvers.one_step import Linear, Solver

Held = Literal["velocity", "clean", "change"]


class ActiveChunk:
    """One chunk on its way from noise to clean.

    Args:
        index: its number in the video.
        latent: [B, C, T, H, W] at the first noise level.
        sigmas: its noise levels, [steps + 1].
        solver: takes its steps.
        order: of forecast and correction.
        held: what is forecast between recomputed steps: the velocity; the clean estimate, for solvers that add fresh
            noise, whose velocities lead away from noise that is no longer there; or the latent's last change.
        corrects: whether reused steps are taken again once the next recomputed velocity is known.

    Attributes:
        step: that it takes next.
        drift, change, signal: what a policy that watches goes by, see `policies.Deciding`.
        mix: the sum of branches that the forecast is of.
        branches: their names.
    """

    def __init__(
        self,
        index: int,
        latent: Tensor,
        sigmas: Sequence[float],
        solver: Solver,
        order: int,
        held: Held = "velocity",
        corrects: bool = True,
    ):
        self.index, self.latent, self.sigmas, self.solver = index, latent, sigmas, solver
        self.order, self.held = order, held
        self.corrects = corrects and held == "velocity" and isinstance(solver, Linear)
        self.step = 0
        self.drift, self.change = 0.0, None
        self.signal: Tensor | None = None
        self.mix: Hashable = None
        self.branches: tuple[Hashable, ...] = ()
        self._restart()

    def _restart(self) -> None:
        self.forecast, self.corrector = Forecast(self.order), Corrector(self.order)
        self._last: tuple[Tensor, Tensor, float] | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def sigma(self) -> float:
        """Noise level of the latent."""
        return self.sigmas[self.step]

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def mixed_anew(self, mix: Hashable) -> bool:
        """Whether the velocity is another sum of branches from this step on; then a new forecast begins, for no line
        leads from one sum to another."""
        if self.step and mix == self.mix:
            return False
        self.mix = mix
        self._restart()
        return True

    def advance(self, velocity: Tensor | None, recomputed: bool = True) -> None:
        """Takes the next step.

        Args:
            velocity: of this step, [B, C, T, H, W]; None where a forecast stands in.
            recomputed: whether the velocity comes from the network, and later steps may be forecast from it.
        """
        x, step, sigma = self.latent, self.step, self.sigma
        length = self.sigmas[step + 1] - sigma
        if velocity is not None and recomputed:
            self._remember(x, velocity, sigma, length)
        if self.held == "change":
            change = self.forecast.at(step)
            self._last, self.latent = (x, change, sigma / length), x + change
        else:
            value = velocity if velocity is not None else self._forecast(x, step, sigma)
            self._last = (x, value, sigma)
            self.latent = self._solved(x, value, step, velocity is not None and recomputed)
        self.step += 1

    def _remember(self, x: Tensor, velocity: Tensor, sigma: float, length: float) -> None:
        kept = {
            "velocity": lambda: velocity,
            "clean": lambda: x - sigma * velocity,
            "change": lambda: velocity * length,
        }[self.held]()
        self.forecast.add(self.step, kept)

    def _forecast(self, x: Tensor, step: int, sigma: float) -> Tensor:
        result = self.forecast.at(step)
        return (x - result) / sigma if self.held == "clean" else result

    def _solved(self, x: Tensor, velocity: Tensor, step: int, recomputed: bool) -> Tensor:
        if not (self.corrects and isinstance(self.solver, Linear)):
            return self.solver.step(x, velocity, step)
        if recomputed:
            x = self.corrector.step(x, self.solver, velocity, step)
        return self.solver.step(x, velocity, step, provisional=not recomputed)

    def estimate(self) -> Tensor:
        """Gives the clean latent that the last step's velocity points to."""
        assert self._last is not None
        x, direction, length = self._last
        return torch.sub(x, direction, alpha=length)
