"""An active chunk: all that is known of it while it is denoised, in one object that is dropped when it is finished."""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..reuse.forecast import Corrector, Forecast, Weights
from ..solvers.one_step import Linear, Solver
from ..solvers.weights import lagrange

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
        weights: of the forecast.

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
        weights: Weights = lagrange,
    ):
        self.index, self.latent, self.sigmas, self.solver = index, latent, sigmas, solver
        self.order, self.held, self.weights = order, held, weights
        self.corrects = corrects and held == "velocity" and isinstance(solver, Linear)
        self.step = 0
        self.drift = 0.0
        self.change: float | None = None
        self.signal: Tensor | None = None
        self.mix: Hashable = None
        self.branches: tuple[Hashable, ...] = ()
        self._restart()

    def _restart(self) -> None:
        self.forecast, self.corrector = Forecast(self.order, self.weights), Corrector(self.order)
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

    @property
    def clean(self) -> bool:
        """Whether it is finished, and without noise."""
        return self.finished and self.sigmas[-1] == 0.0

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
        fresh = velocity is not None and recomputed
        if velocity is not None and recomputed:
            kept = velocity
            if self.held == "clean":
                kept = x - sigma * velocity
            elif self.held == "change":
                kept = velocity * (self.sigmas[step + 1] - sigma)
            self.forecast.add(step, kept)
        if self.held == "change":
            change = self.forecast.at(step)
            self._last, self.latent = (x, change, sigma / (self.sigmas[step + 1] - sigma)), x + change
        else:
            value = velocity if velocity is not None else self.forecast_velocity()
            self._last = (x, value, sigma)
            self.latent = self._solved(x, value, step, fresh)
        self.step += 1

    def take(self, clean: Tensor | None) -> Tensor:
        """Takes the next step of a sampler that goes by clean estimates and moves the latent itself.

        Args:
            clean: of this step; None where the forecast stands in.

        Returns:
            The clean estimate to go by.
        """
        if clean is not None:
            self.forecast.add(self.step, clean)
        self.step += 1
        return self.forecast.at(self.step - 1)

    def forecast_velocity(self) -> Tensor:
        """Gives the velocity that stands in for this step's."""
        result = self.forecast.at(self.step)
        return (self.latent - result) / self.sigma if self.held == "clean" else result

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
