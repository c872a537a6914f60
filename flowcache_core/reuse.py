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

from .schedule import ChunkSchedule, Place

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


def spread(schedule: ChunkSchedule, count: int) -> tuple[int, ...]:
    """So many steps to recompute, the same for every chunk: somewhat denser towards the end, and on common ticks.

    Where chunks overlap, a recomputed chunk wants fresh keys from the older ones: with every step those that lie whole
    lags later are taken too. Steps are added so, one such row at a time, where they shorten the gaps most; what is left
    over goes towards the end, where rows are short.
    """
    steps, lag = schedule.steps, schedule.lag or schedule.steps
    if count >= steps:
        return tuple(range(steps))
    while -(-steps // lag) > count:  # too few for every lag: neighbours take turns
        lag += schedule.lag or steps
    chosen = set(range(0, steps, lag))
    while len(chosen) < count:
        room = count - len(chosen)
        rows = [set(range(step, steps, lag)) - chosen for step in range(1, steps)]
        fitting = [row for row in rows if 0 < len(row) <= room]
        chosen |= min(
            fitting, key=lambda row: (_unevenness(chosen | row, steps) - _unevenness(chosen, steps)) / len(row)
        )
    return tuple(sorted(chosen))


def _unevenness(chosen: set[int], steps: int) -> float:
    """The sum of the cubed gaps between chosen steps, which is how a second-order method errs.

    Gaps are measured for the most part in steps, and a little in noise level, which falls fastest at the end.
    """
    parts = [step / steps for step in (*sorted(chosen), steps)]
    places = [0.85 * part + 0.15 * part**2 / (3.0 - 2.0 * part**2) for part in parts]
    return sum((after - before) ** 3 for before, after in zip(places, places[1:], strict=False))


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

    def weights(self, step: int) -> list[float]:
        """Lagrange weights of the kept results at a step; they add up to 1."""
        return [
            _product((step - other) / (mine - other) for other in self.steps if other != mine) for mine in self.steps
        ]

    def at(self, step: int) -> Tensor:
        if len(self.results) == 1:
            return self.results[0]
        if len(self.results) == 2:
            older, newer = self.steps
            return torch.lerp(self.results[0], self.results[1], (step - older) / (newer - older))
        weights = self.weights(step)
        total = self.results[-1] * weights[-1]
        for weight, result in zip(weights[:-1], self.results[:-1], strict=True):
            total.add_(result, alpha=weight)
        return total


class Corrector:
    """Takes a chunk's reused steps again as soon as the next recomputed velocity is known: along the line, over the
    step number, between the velocities at both ends, instead of along the forecast. It costs no forward.

    Source: the corrector of predictor-corrector methods in PEC mode, as in Hairer, Norsett, Wanner, Solving Ordinary
    Differential Equations I, section III.1; here the line is summed at the same steps that a plain run takes.
    """

    def __init__(self):
        self.at = 0
        self.velocity: Tensor  # the last recomputed, at step `at`; the first step is one
        self._moved: Tensor | None
        self._begin_anew()

    def step(self, velocity: Tensor, step: int, length: float, recomputed: bool) -> Tensor | None:
        """To be told every step of the chunk, in order.

        Args:
            velocity: that the step takes, [B, C, T, H, W].
            step: its number.
            length: change of the noise level in the step.
            recomputed: whether the velocity is the network's.

        Returns:
            What to add to the latent before this step, or None.
        """
        if not recomputed:
            self._length += length
            self._moment += (step - self.at) * length
            part = velocity * length
            self._moved = part if self._moved is None else self._moved.add_(part)
            return None
        change = None
        if self._moved is not None:
            newer = self._moment / (step - self.at)
            change = (newer * velocity).add_(self.velocity, alpha=self._length - newer).sub_(self._moved)
        self.at, self.velocity = step, velocity
        self._begin_anew()
        return change

    def _begin_anew(self) -> None:
        self._length = self._moment = 0.0  # sums of the reused steps' lengths, and of lengths times distances
        self._moved = None  # how far the reused steps have moved the latent


def _product(factors) -> float:
    product = 1.0
    for factor in factors:
        product *= factor
    return product
