"""The search for the steps to recompute: lists are improved by small moves, then measured.

Whatever makes and compares videos is the caller's.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import cache

from ..errors import UserError
from ..schedule import ChunkSchedule
from .calibration import Calibration, Measured
from .placement import neighbours, place_steps

COUNTS = (5, 6, 7, 8, 9, 12, 15, 20, 30)  # recomputed steps of a chunk
FINALISTS = 2  # lists of each length that are measured: the best on the search's few clips may not be elsewhere
# Likeness that twice the work buys, dB: the demo model's on MAGI-1's schedule, teacher-forced, from 8 steps to 12.
DOUBLED = 11.0

Steps = tuple[int, ...]
Score = Callable[[Steps], float]  # PSNR to the plain run of a list of recomputed steps, dB


def moved(chosen: Steps, schedule: ChunkSchedule, draw: random.Random) -> Steps:
    """An aligned list that differs little, the likelier the less; the list itself if there is none."""
    others = list(neighbours(frozenset(chosen), frozenset({0}), schedule.steps, schedule.lag or schedule.steps))
    if not others:
        return chosen
    lists = [tuple(sorted(other)) for other in others]
    nearness = [1 / sum(abs(a - b) for a, b in zip(chosen, other, strict=True)) for other in lists]
    return draw.choices(lists, nearness)[0]


def improved(start: Steps, schedule: ChunkSchedule, score: Score, until: float, draw: random.Random) -> list[Steps]:
    """Every list scored while moves from `start` were tried, as many as can be before a time of `time.monotonic`; the
    best first."""
    best, scores, took = start, {start: score(start)}, 0.0
    while (begun := time.monotonic()) + took < until:
        other = next((new for new in (moved(best, schedule, draw) for _ in range(50)) if new not in scores), None)
        if other is None:
            break
        scores[other] = score(other)
        if scores[other] > scores[best]:
            best = other
        took = time.monotonic() - begun
    return sorted(scores, key=scores.__getitem__, reverse=True)


def found_before(known: Calibration | None, schedule: ChunkSchedule, count: int) -> list[Steps]:
    """The list of so many steps of an earlier calibration for the same schedule, if it has one."""
    fits = known is not None and (known.steps, known.lag) == (schedule.steps, schedule.lag)
    listed = known.by_count(count) if known and fits else None
    return [listed] if listed else []


def lengthened(chosen: Steps, schedule: ChunkSchedule, count: int) -> Steps:
    """A list with steps added in the middle of its widest gaps until there are `count`."""
    steps = list(chosen)
    while len(steps) < count:
        ends = [*steps, schedule.steps]
        place = max(range(len(steps)), key=lambda place: ends[place + 1] - ends[place])
        steps.insert(place + 1, (ends[place] + ends[place + 1]) // 2)
    return tuple(steps)


def work(chosen: Steps, schedule: ChunkSchedule, alone: float) -> float:
    """What the recomputed steps of a chunk cost, in steps that are run with a full company of chunks.

    Chunks that recompute on one tick share a call. Small networks are bound by calls: then a step that is run `alone`
    costs more than one in company. Where the network fills the device it costs the same, and this is their number.
    """
    lag = schedule.lag or schedule.steps
    company = max(1, -(-schedule.steps // lag))
    if company == 1:
        return float(len(chosen))
    together = [sum(other % lag == phase for other in chosen) for phase in {step % lag for step in chosen}]
    call = (alone - 1.0) * company / (company - 1)  # of a call, where a step in full company costs 1 with its share
    step = 1.0 - call / company
    return sum(call + step * size for size in together)


def search_calibration(
    schedule: ChunkSchedule,
    clips: int,
    search_score: Score,
    final_score: Score,
    seconds: float,
    counts: Sequence[int] = COUNTS,
    told: Callable[[str], None] = lambda words: None,
    known: Calibration | None = None,
    alone: float = 1.0,
) -> Calibration:
    """Searches for about so long, all counts alike, then measures the best lists of each; what ships of them rises with
    the number of steps.

    Args:
        schedule: of the clips that the curve is measured on.
        clips: their number.
        search_score, final_score: likeness to the plain run in dB of a list of recomputed steps; the first on few short
            clips, the second on what is reported.
        alone: what a step costs that no other chunk recomputes with, over one in full company, see `work`.

    Raises:
        UserError: too few steps for any of them to be left out.
    """
    draw = random.Random(0)
    if schedule.steps <= min(counts):
        raise UserError(
            f"{schedule.steps} steps are too few to leave any out; calibrate with more than {min(counts)}, or use the "
            f"preset 'off'."
        )
    counts = [count for count in counts if count < schedule.steps]

    @cache
    def weighed(chosen: Steps) -> float:
        return search_score(chosen) - DOUBLED * math.log2(work(chosen, schedule, alone) / len(chosen))

    weighed(place_steps(schedule, counts[0]))  # makes the plain run, which is not to count as a list's time
    begun = time.monotonic()
    finalists: list[list[Steps]] = []
    for place, count in enumerate(counts):
        longer = [lengthened(finalists[-1][0], schedule, count)] if finalists else []
        starts = [place_steps(schedule, count), *found_before(known, schedule, count), *longer]
        until = begun + seconds * (place + 1) / len(counts)
        ranked = improved(max(starts, key=weighed), schedule, weighed, until, draw)
        finalists.append(ranked[:FINALISTS])
        told(f"{count} steps: {ranked[0]}")
    curve: list[Measured] = []
    for lists in finalists:
        measured = [Measured(one, round(final_score(one), 2)) for one in lists]
        best = max(measured, key=lambda one: one.psnr)
        told(f"{len(best.steps)} steps: {best.psnr:.1f} dB")
        if not curve or best.psnr > curve[-1].psnr:
            curve.append(best)
        else:
            told(f"{len(best.steps)} steps are left out: no better than {len(curve[-1].steps)}")
    return Calibration(schedule.steps, schedule.lag, schedule.chunks, clips, tuple(curve))
