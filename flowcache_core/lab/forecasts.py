"""Published forecasts of a step that is not recomputed, as weights of the last recomputed results.

Both take differences of the results at the recomputed steps, each divided by the distance of the last two steps alone
(of differences of higher order too, as their code does), and put the distance to the step asked for through a basis.
Here they forecast a chunk's velocity; in their papers the output of every layer, which for a residual network is more
memory for nearly the same sum.
"""

import math
from collections.abc import Callable, Sequence

from ..engine.build import RunSettings, build_engine
from ..engine.causal import CausalForward
from ..engine.loop import Engine
from ..reuse.forecast import Weights

SCALE = 0.5  # HiCache's sigma


def taylor(steps: tuple[int, ...], at: float) -> Sequence[float]:
    """TaylorSeer (arXiv 2503.06923, equation 3): the sum over i of x^i / i! times the i-th difference."""
    return _of_differences(steps, at, lambda order, x: x**order)


def hermite(steps: tuple[int, ...], at: float) -> Sequence[float]:
    """HiCache (arXiv 2508.16984): sigma^i H_i(sigma x) in place of x^i, with the physicists' Hermite polynomials."""
    return _of_differences(steps, at, lambda order, x: SCALE**order * _hermite(order, SCALE * x))


def _of_differences(steps: tuple[int, ...], at: float, basis: Callable[[int, float], float]) -> list[float]:
    """Weights of the results at `steps`, oldest first, in the sum of differences under a basis of the distance."""
    count, x = len(steps), at - steps[-1]
    # Differences of each order after every recomputed step, as weights of all results.
    levels = [[float(mine == other) for other in range(count)] for mine in range(count)]
    total = list(levels[-1])
    for order in range(1, count):
        distances = [steps[place] - steps[place - 1] for place in range(order, count)]
        pairs = zip(levels[1:], levels, distances, strict=False)
        levels = [[(a - b) / distance for a, b in zip(now, before, strict=True)] for now, before, distance in pairs]
        share = basis(order, x) / math.factorial(order)
        total = [a + share * b for a, b in zip(total, levels[-1], strict=True)]
    return total


def _hermite(order: int, x: float) -> float:
    before, now = 0.0, 1.0
    for degree in range(order):
        before, now = now, 2 * x * now - 2 * degree * before
    return now


def forecasting_engine(
    run: RunSettings, make: Callable[..., CausalForward] = CausalForward, *, weights: Weights
) -> Engine:
    """Makes a run over a history whose forecasts have these weights."""
    engine = build_engine(run, make)
    engine.forecast_weights = weights
    return engine
