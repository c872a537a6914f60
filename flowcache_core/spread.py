"""Where in a chunk's way the recomputed steps lie, when so many may be.

Where chunks overlap, a recomputed chunk wants fresh keys of the older active ones. So with every recomputed step those
that lie whole lags later are recomputed too, which is when the older chunks get there; a list with this property is
called aligned. Only the start of a chunk, nearly noise, may find them stale.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations

from .noise_levels import shifted
from .schedule import ChunkSchedule

Steps = frozenset[int]

EXTRAPOLATED = (
    5.0  # error of a forecast over that of the line between both ends: Adams-Bashforth's over Adams-Moulton's
)
EARLY = 0.4  # errors made early are carried on: they weigh 1 / (share of the steps done + this)


def spread(schedule: ChunkSchedule, count: int) -> tuple[int, ...]:
    """So many steps to recompute, the same for every chunk: aligned, and with the least error by `error`.

    With fewer steps than a chunk's way has lags, alignment is to a multiple of the lag, so that neighbours take turns.
    """
    return _spread(schedule.steps, schedule.lag or schedule.steps, count)


@cache
def _spread(steps: int, lag: int, count: int) -> tuple[int, ...]:
    if count >= steps:
        return tuple(range(steps))
    short = lag
    while 2 + (-(-steps // lag) - 1) // 2 > max(2, count):
        lag += short
    whole = range(lag, steps, lag)  # a new chunk begins when the older ones are there
    found = []
    for skipped in range(len(whole) // 2 + 1):
        fixed = frozenset({0, *whole[skipped:]})
        if len(fixed) <= count:
            found.append(_exchanged(_filled(fixed, steps, lag, count), fixed, steps, lag))
    best = min(found, key=lambda chosen: error(chosen, steps), default=frozenset({0}))
    return tuple(sorted(best))


def error(chosen: Steps, steps: int) -> float:
    """How far a run with these recomputed steps is expected to end from the plain one; in no unit.

    Over a gap the velocity errs by the gap's square, and the latent by that times the fall of the noise level, for
    which MAGI-1's stands. The last gap is not corrected (`reuse.Corrector`). On the demo model single gaps of MAGI-1's
    schedule erred as that says, within 20% but for one.
    """
    total, ends = 0.0, [*sorted(chosen), steps]
    for before, after in zip(ends, ends[1:], strict=False):
        fall = _level(before / steps) - _level(after / steps)
        weight = (EXTRAPOLATED if after == steps else 1.0) / (before / steps + EARLY)
        total += (((after - before) ** 2 - 1) * (64 / steps) ** 2 * fall * weight) ** 2
    return total


def neighbours(chosen: Steps, fixed: Steps, steps: int, lag: int) -> Iterator[Steps]:
    """Aligned lists of the same length that differ in one step, in two, or in all that lie whole lags apart."""
    free = [step for step in chosen - fixed if step <= lag or step - lag not in chosen]
    phases = {step % lag for step in chosen}
    out = {frozenset(steps_out) for size in (1, 2) for steps_out in combinations(free, size)}
    out |= {frozenset(step for step in chosen - fixed if step % lag == phase) for phase in phases}
    for leaving in out - {frozenset()}:
        left = chosen - leaving
        if _aligned(left, steps, lag):
            yield from (left | row for row in _rows(left, steps, lag) if len(row) == len(leaving) and row != leaving)


def _filled(chosen: Steps, steps: int, lag: int, count: int) -> Steps:
    """Rows added where they lower the error most for their length."""
    while len(chosen) < count:
        now = error(chosen, steps)
        fitting = [row for row in _rows(chosen, steps, lag) if len(row) <= count - len(chosen)]
        chosen |= max(fitting, key=lambda row: (now - error(chosen | row, steps)) / len(row))
    return chosen


def _exchanged(chosen: Steps, fixed: Steps, steps: int, lag: int) -> Steps:
    """The best neighbour's best neighbour, and so on until there is none better."""
    while True:
        best = min(neighbours(chosen, fixed, steps, lag), key=lambda other: error(other, steps), default=chosen)
        if error(best, steps) >= error(chosen, steps):
            return chosen
        chosen = best


def _rows(chosen: Steps, steps: int, lag: int) -> Iterator[Steps]:
    """For every step that is not chosen: what must be added with it to stay aligned."""
    for step in range(1, steps):
        if step not in chosen:
            yield frozenset(range(step, steps, lag)) - chosen


def _aligned(chosen: Steps, steps: int, lag: int) -> bool:
    return all(step + lag in chosen for step in chosen if 0 < step < steps - lag)


def _level(share: float) -> float:
    return shifted(1.0 - share**2, 3.0)
