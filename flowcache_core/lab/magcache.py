"""MagCache's rule: steps are skipped by how the size of the blocks' residual changes from step to step.

That curve is measured once, on another caption. From the last recomputed step on its ratios are multiplied, and the
distances of the products from 1 are added up: a step is recomputed where their sum reaches the threshold, or where so
many have been skipped in a row.

Source: MagCache (arXiv 2506.09045), its code for Wan 2.1. One curve stands here for every chunk: the mean over a clip's
chunks. Nothing is left out.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from ..engine.build import RunSettings, build_engine, causal_forward
from ..engine.causal import CausalForward
from ..engine.loop import Engine
from ..models.wan import WanBackbone
from ..report import Report
from ..reuse.policies import FixedPolicy
from ..schedule import Place
from ..settings import HELD, Drift, Settings
from .runs import Clips, Method, run
from .setups import Setup

RETAINED = 0.2  # share of the steps, the first ones, that are always recomputed
CLIPS, CHUNKS, SEED = 2, 4, 77  # that the curve is measured on


class MeasuringForward(CausalForward):
    """A run over a history, every step of it recomputed, that measures its residuals.

    Attributes:
        ratios: by step, the size of the residual over that of the step before; one a chunk.
    """

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.ratios: dict[int, list[float]] = {}
        self._before: dict[object, Tensor] = {}

    def _hold(self, place: Place, branches: Sequence[Hashable], residual: Tensor) -> None:
        super()._hold(place, branches, residual)
        if place.step is None:
            return
        size = residual.float().norm(dim=-1)
        if place.step:
            self.ratios.setdefault(place.step, []).append((size / self._before[place.chunk]).mean().item())
        self._before[place.chunk] = size


@cache
def magnitudes(backbone: WanBackbone, setup: Setup) -> tuple[float, ...]:
    """Measures the ratios of a model and schedule, [steps]; the first is 1."""
    held: list[Engine] = []
    every = Settings(Drift(0.0, holds="residual"), HELD)
    build = partial(build_engine, make=MeasuringForward)
    run(
        Method("measured", settings=every, build=build),
        setup,
        Clips.held_out(backbone, CLIPS, CHUNKS, SEED),
        held.append,
    )
    forward = held[0].forward
    assert isinstance(forward, MeasuringForward)
    return (1.0, *(sum(forward.ratios[step]) / len(forward.ratios[step]) for step in range(1, setup.steps)))


def recomputed_steps(ratios: Sequence[float], threshold: float, most: int) -> tuple[int, ...]:
    """Chooses the steps that are recomputed.

    Args:
        ratios: of the model, one a step.
        threshold: of the summed distances.
        most: steps that are skipped in a row.
    """
    retained = max(1, int(RETAINED * len(ratios)))
    chosen, product, error, skipped = list(range(retained)), 1.0, 0.0, 0
    for step in range(retained, len(ratios)):
        product *= ratios[step]
        error += abs(1.0 - product)
        skipped += 1
        if error >= threshold or skipped > most:
            chosen.append(step)
            product, error, skipped = 1.0, 0.0, 0
    return tuple(chosen)


def magcache_engine(
    run: RunSettings,
    make: Callable[..., CausalForward] = CausalForward,
    *,
    setup: Setup,
    threshold: float,
    most: int,
) -> Engine:
    """Makes a run over a history that recomputes by MagCache's rule and holds what its settings hold."""
    with torch.inference_mode():
        listed = frozenset(recomputed_steps(magnitudes(run.backbone, setup), threshold, most))
    policy = FixedPolicy(lambda step, steps: step in listed)
    inner = causal_forward(run, policy, Report(run.schedule, run.label), make)
    return Engine(inner, run.schedule, policy, HELD, run.sampling)
