"""The ways of sampling that are measured, as their models' makers run them."""

from collections.abc import Callable
from dataclasses import dataclass

from ..solvers.multistep import SkyReelsUniPC
from ..solvers.noise_levels import linear, magi, skyreels
from ..solvers.one_step import Euler, Renoise, SolverFactory


@dataclass(frozen=True)
class Setup:
    """One way of sampling.

    Attributes:
        name: "magi", "skyreels" or "causal".
        steps, lag: of its schedule, see `schedule.ChunkSchedule`.
        levels: noise levels [steps + 1] from the number of steps.
        solver: makes a chunk's solver.
        window: unaccelerated, every frame of the window is recomputed at every tick, and nothing is kept.
    """

    name: str
    steps: int
    lag: int
    levels: Callable[[int], list[float]]
    solver: SolverFactory
    window: bool = False

    @property
    def converges(self) -> bool:
        """More steps come closer to one result: not where the solver adds fresh noise at each of them."""
        return not getattr(self.solver, "adds_noise", False)

    def lag_of(self, steps: int) -> int:
        """The lag at which so many steps keep as many chunks active."""
        return max(1, round(self.lag * steps / self.steps))


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("magi", 64, 16, magi, Euler),
        Setup("skyreels", 50, 5, skyreels, SkyReelsUniPC, window=True),
        Setup("causal", 4, 4, lambda steps: linear(steps, 5.0), Renoise),
    )
}
