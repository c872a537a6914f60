"""When a chunk's network is run again: a policy answers, for every chunk of a tick, recompute or reuse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..schedule import ChunkSchedule


class Deciding(Protocol):
    """A chunk, as far as a policy looks at it.

    Attributes:
        step, steps: the step that it is at, and how many it takes in all.
        drift: accumulated change of its signal since it was last recomputed; the policy keeps it.
        change: relative L1 change of its signal since the last step; None where there was none to compare with.
    """

    step: int
    drift: float
    change: float | None

    @property
    def steps(self) -> int: ...


class Policy(Protocol):
    """Decides for all chunks of a tick.

    Attributes:
        watches: whether it needs the chunks' `change`.
        whole_window: whether that is to be one change for all active chunks.
    """

    @property
    def watches(self) -> bool: ...

    @property
    def whole_window(self) -> bool: ...

    def decide(self, chunks: Sequence[Deciding]) -> list[bool]:
        """Says for each chunk whether to run the network."""

    def recomputed(self, steps: int) -> frozenset[int] | None:
        """The recomputed steps of a chunk that takes so many; None where they depend on what is seen."""

    def weighed(self, chunk: Deciding) -> float | None:
        """What a chunk's step adds to its drift, to be called before `decide`; None where it is recomputed anyway."""


@dataclass(frozen=True)
class FixedPolicy:
    """Decides by the number of the step alone.

    Attributes:
        chooses: whether a step is recomputed, from its number and the number of all steps. The first one always is.
    """

    chooses: Callable[[int, int], bool]
    watches = whole_window = False

    def decide(self, chunks: Sequence[Deciding]) -> list[bool]:
        return [chunk.step == 0 or self.chooses(chunk.step, chunk.steps) for chunk in chunks]

    def recomputed(self, steps: int) -> frozenset[int]:
        return frozenset({0, *(step for step in range(steps) if self.chooses(step, steps))})

    def weighed(self, chunk: Deciding) -> None:
        return None


@dataclass(frozen=True)
class DriftPolicy:
    """Recomputes a chunk when its input has drifted: FlowCache's rule (arXiv 2602.10825), by each chunk's own change,
    or TeaCache's (arXiv 2411.19108), by one change for all.

    Attributes:
        threshold: accumulated relative L1 change at which to recompute.
        warmup: first steps of a chunk that are always recomputed.
        last: whether a chunk's last step always is.
        rescale: coefficients, highest power first, of a polynomial that the change is put through first. Where it is
            not positive, the step is recomputed: outside its fitted range the published polynomial would lock in reuse.
        whole_window: TeaCache's rule. A chunk that begins takes over the window's drift.
    """

    threshold: float
    warmup: int
    last: bool
    rescale: Sequence[float] | None
    whole_window: bool
    watches = True

    def decide(self, chunks: Sequence[Deciding]) -> list[bool]:
        if self.whole_window:
            oldest = max(chunks, key=lambda chunk: chunk.step)
            for chunk in chunks:
                chunk.drift = oldest.drift
        return [self._decide(chunk) for chunk in chunks]

    def _decide(self, chunk: Deciding) -> bool:
        change = rescaled(chunk.change, self.rescale)
        drifted, must = change is None or chunk.drift + change >= self.threshold, self._must(chunk)
        # What must be recomputed starts a chunk's own drift anew, but not the window's.
        restarts = drifted or (must and not self.whole_window)
        chunk.drift = 0.0 if restarts or change is None else chunk.drift + change
        return drifted or must

    def _must(self, chunk: Deciding) -> bool:
        return chunk.step < max(1, self.warmup) or (self.last and chunk.step == chunk.steps - 1)

    def recomputed(self, steps: int) -> None:
        return None

    def weighed(self, chunk: Deciding) -> float | None:
        return None if self._must(chunk) else rescaled(chunk.change, self.rescale)


def rescaled(change: float | None, coefficients: Sequence[float] | None) -> float | None:
    """Puts a change through a polynomial; None where there is no change, or the polynomial is not positive."""
    if change is None or coefficients is None:
        return change
    value = float(np.polyval(coefficients, change))
    return value if value > 0 else None


def aligned(policy: Policy, schedule: ChunkSchedule, also: frozenset[int] = frozenset()) -> bool:
    """Says whether all active chunks recompute on the same ticks: whenever one does, every older one does too.

    The first step is left out: a chunk that begins need not find the older ones recomputed.

    Args:
        also: steps that are recomputed whatever the policy says.
    """
    if schedule.max_active == 1 or schedule.lag == 0:
        return True
    chosen = policy.recomputed(schedule.steps)
    if chosen is None:
        return False
    if schedule.first_steps not in (None, schedule.steps):  # its steps do not lie whole lags from the others'
        return len(chosen) == schedule.steps
    chosen |= also
    later = (step + schedule.lag for step in chosen if step > 0)
    return all(step in chosen for step in later if step < schedule.steps)


def relative_change(now: Sequence[Tensor], before: Sequence[Tensor]) -> list[float]:
    """Measures mean|now - before| / mean|before| of each pair, read back from the device once."""
    ratios = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(now, before, strict=True)]
    return torch.stack(ratios).tolist() if ratios else []
