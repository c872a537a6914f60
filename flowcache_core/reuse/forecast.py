"""What stands in for a step that is not recomputed, and how it is corrected once the next recomputed step is known.

Together they make every chunk a multistep predictor-corrector solver of its own.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..solvers.one_step import Linear
from ..solvers.weights import lagrange, weighted

Weights = Callable[[tuple[int, ...], int], Sequence[float]]  # of results at some steps, for what is expected at another


class Forecast:
    """The last recomputed results of one chunk, and what they say about another step.

    Samplers space their noise levels so that results change evenly from step to step: over the step number a line was
    better by 2 to 4 dB than over the noise level.

    Args:
        order: 0 holds the last result; 1 and 2 put a line or a parabola over the steps through the last two or three.
            With fewer results than that the order is what they allow.
        weights: of the last results in the sum that is expected; the polynomial through them unless told otherwise.
    """

    def __init__(self, order: int, weights: Weights = lagrange):
        self.order, self.weights = order, weights
        self.steps: list[int] = []
        self.results: list[Tensor] = []

    def add(self, step: int, result: Tensor) -> None:
        """Takes the recomputed result of a step."""
        self.steps = [*self.steps[-self.order :], step] if self.order else [step]
        self.results = [*self.results[-self.order :], result] if self.order else [result]

    def at(self, step: int) -> Tensor:
        """Gives the result expected at a step."""
        return weighted(self.results, self.weights(tuple(self.steps), step))


class Corrector:
    """Takes a chunk's reused steps again as soon as the next recomputed velocity is known: with velocities from the
    line or parabola, over the step number, through the recomputed ones around them, instead of from the forecast. The
    solver takes every step as in a plain run, and no forward is added.

    Source: the corrector of predictor-corrector methods in PEC mode, as in Hairer, Norsett, Wanner, Solving Ordinary
    Differential Equations I, section III.1.

    Args:
        order: 1 for a line between both ends, 2 for a parabola that also goes through the velocity before.
    """

    def __init__(self, order: int):
        self.order = max(1, order)
        self.steps: tuple[int, ...] = ()  # recomputed ones that the next curve goes through
        self.velocities: list[Tensor] = []
        self.start: tuple[Tensor, tuple[Tensor, ...]]  # the latent and the solver's memory before the last of them

    def step(self, latent: Tensor, solver: Linear, velocity: Tensor, step: int) -> Tensor:
        """Corrects a chunk at a recomputed step; to be told every one of them, in order, before the solver takes it.

        Args:
            latent, velocity: before the step, [B, C, T, H, W].
            solver: that will take it.
            step: its number.

        Returns:
            The latent to go on from.
        """
        steps, velocities = (*self.steps, step), [*self.velocities, velocity]
        if self.steps and step - self.steps[-1] > 1:
            latent, solver.memory = self.start
            latent = solver.along(latent, velocities, steps)
        self.steps, self.velocities = steps[-self.order :], velocities[-self.order :]
        self.start = latent, solver.memory
        return latent
