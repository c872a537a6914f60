"""When a chunk's network is run again, and what stands in for it when it is not.

A policy answers, for each step of each chunk, recompute or reuse. Between recomputed steps the velocity is held or
forecast through the last recomputed ones, and corrected once the next is known, which makes every chunk a multistep
predictor-corrector solver of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import Place
from ..solvers.one_step import Linear
from ..solvers.weights import lagrange, weighted

Branch = object  # a hashable name of one side of guidance: "cond", "uncond", ...


class Policy(Protocol):
    """Decides for each chunk and branch.

    Attributes:
        watches: whether it needs to see how much the input changed.
        whole_window: whether it wants one change for all active chunks rather than each chunk's own.
    """

    watches: bool
    whole_window: bool

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        """Whether to run the network.

        Args:
            place: the chunk, its step and the tick.
            steps: how many steps the chunk takes in all.
            branch: the side of guidance.
            change: relative L1 change of the chunk's signal since its last step, where the policy watches it.
        """
        ...


@dataclass
class Always:
    """Plain sampling: every step is recomputed."""

    watches = whole_window = False

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        return True


@dataclass
class Periodic:
    """Every n-th step of a chunk. Where n divides the lag, all active chunks recompute on the same ticks."""

    every: int
    warmup: int = 1
    last: bool = False  # also a chunk's last step

    watches = whole_window = False

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        return _must(place, steps, self.warmup, self.last) or place.step % self.every == 0


@dataclass
class FixedSteps:
    """A list of steps, the same for every chunk; `align` (a schedule's lag) makes all active chunks share their ticks.

    Aligned, a chunk also recomputes whenever another active chunk's list says so, because a recomputed chunk wants
    fresh keys from the chunks before it.
    """

    steps: Sequence[int]
    align: int | None = None

    watches = whole_window = False

    def __post_init__(self):
        self._chosen = frozenset(self.steps)
        self._phases = frozenset(step % self.align for step in self.steps) if self.align else frozenset()

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        in_phase = place.step % self.align in self._phases if self.align else False
        return place.step == 0 or place.step in self._chosen or in_phase


@dataclass
class Chunkwise:
    """FlowCache's rule (arXiv 2602.10825): each chunk and branch adds up how much its own input has drifted since it
    was last recomputed, and is recomputed when that reaches the threshold.

    Attributes:
        threshold: accumulated relative L1 change at which to recompute.
        warmup: first steps of a chunk that are always recomputed.
        last: a chunk's last step is always recomputed.
        rescale: coefficients, highest power first, of a polynomial that the change is put through first. Where it is
            not positive, the step is recomputed: outside its fitted range the published polynomial would lock in reuse.
    """

    threshold: float
    warmup: int = 5
    last: bool = False
    rescale: Sequence[float] | None = None

    watches = True
    whole_window = False
    drift: dict[tuple[int, Branch], float] = field(default_factory=dict)

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        key = (place.chunk, branch)
        step = _rescaled(change, self.rescale)
        drift = None if step is None else self.drift.get(key, 0.0) + step
        again = drift is None or drift >= self.threshold or _must(place, steps, self.warmup, self.last)
        self.drift[key] = 0.0 if again or drift is None else drift
        return again


@dataclass
class Global:
    """TeaCache's rule (arXiv 2411.19108): one decision a tick for all active chunks, from the whole window's change.

    The engine passes every active chunk the same change: the window's. A chunk's first step is still recomputed.
    """

    threshold: float
    warmup: int = 5
    last: bool = False
    rescale: Sequence[float] | None = None

    watches = True
    whole_window = True
    drift: dict[Branch, float] = field(default_factory=dict)
    _decided: dict[Branch, tuple[int, bool]] = field(default_factory=dict)

    def recompute(self, place: Place, steps: int, branch: Branch, change: float | None) -> bool:
        tick, again = self._decided.get(branch, (None, False))
        if tick != place.tick:
            step = _rescaled(change, self.rescale)
            drift = None if step is None else self.drift.get(branch, 0.0) + step
            again = drift is None or drift >= self.threshold
            self.drift[branch] = 0.0 if again or drift is None else drift
            self._decided[branch] = (place.tick, again)
        return again or _must(place, steps, self.warmup, self.last)


def _must(place: Place, steps: int, warmup: int, last: bool) -> bool:
    return place.step < max(1, warmup) or (last and place.step == steps - 1)


def _rescaled(change: float | None, coefficients: Sequence[float] | None) -> float | None:
    """The change put through the polynomial; None where there is no change to go by or the polynomial is not
    positive."""
    if change is None or coefficients is None:
        return change
    value = 0.0
    for coefficient in coefficients:
        value = value * change + coefficient
    return value if value > 0 else None


def relative_change(now: Sequence[Tensor], before: Sequence[Tensor]) -> list[float]:
    """mean|now - before| / mean|before| of each pair, read back from the device once."""
    ratios = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(now, before, strict=True)]
    return torch.stack(ratios).tolist() if ratios else []


def changes(signals: dict[int, Tensor], before: dict[int, Tensor], whole_window: bool) -> dict[int, float]:
    """How much each chunk's signal has changed since the last tick, for the chunks that were active then.

    Args:
        signals, before: of this tick and the last, by chunk.
        whole_window: one change for all, of all known signals together; chunks that are new get it too.
    """
    known = [chunk for chunk in signals if chunk in before]
    now, then = [signals[chunk] for chunk in known], [before[chunk] for chunk in known]
    if whole_window and known:
        now, then = ([torch.cat([signal.flatten() for signal in part])] for part in (now, then))
        return dict.fromkeys(signals, relative_change(now, then)[0])
    return dict(zip(known, relative_change(now, then), strict=True))


class Forecast:
    """The last recomputed results of one chunk and branch, and what they say about another step.

    Samplers space their noise levels so that results change evenly from step to step: over the step number a line was
    better by 2 to 4 dB than over the noise level.

    Args:
        order: 0 holds the last result; 1 and 2 put a line or a parabola over the steps through the last two or three.
            With fewer results than that the order is what they allow.
    """

    def __init__(self, order: int):
        self.order = order
        self.steps: list[int] = []
        self.results: list[Tensor] = []

    def add(self, step: int, result: Tensor) -> None:
        if self.steps and self.steps[-1] == step:
            self.steps.pop(), self.results.pop()
        self.steps = [*self.steps[-self.order :], step] if self.order else [step]
        self.results = [*self.results[-self.order :], result] if self.order else [result]

    def at(self, step: int) -> Tensor:
        return weighted(self.results, lagrange(tuple(self.steps), step))


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
        """To be told every recomputed step of the chunk, in order, before the solver takes it.

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
