"""The search for the steps to recompute: lists are improved by small moves, then measured.

Whatever makes and compares videos is the caller's.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import cache

from ..errors import UserError
from ..schedule import ChunkSchedule
from .calibration import Calibration, Measured
from .placement import neighbours, place_steps

COUNTS = (5, 6, 7, 8, 9, 12, 15, 20, 30)  # recomputed steps of a chunk

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


def improved(start: Steps, schedule: ChunkSchedule, score: Score, until: float, draw: random.Random) -> Steps:
    """The best list found by moves from `start`, as many as can be scored before a time of `time.monotonic`."""
    best, reached, seen, took = start, score(start), {start}, 0.0
    while (begun := time.monotonic()) + took < until:
        other = next((new for new in (moved(best, schedule, draw) for _ in range(50)) if new not in seen), None)
        if other is None:
            break
        seen.add(other)
        if (found := score(other)) > reached:
            best, reached = other, found
        took = time.monotonic() - begun
    return best


def found_before(known: Calibration | None, schedule: ChunkSchedule, count: int) -> list[Steps]:
    """The list of so many steps of an earlier calibration for the same schedule, if it has one."""
    fits = known is not None and (known.steps, known.lag) == (schedule.steps, schedule.lag)
    listed = known.by_count(count) if known and fits else None
    return [listed] if listed else []


def search_calibration(
    schedule: ChunkSchedule,
    clips: int,
    search_score: Score,
    final_score: Score,
    seconds: float,
    counts: Sequence[int] = COUNTS,
    told: Callable[[str], None] = lambda words: None,
    known: Calibration | None = None,
) -> Calibration:
    """Searches for about so long, all counts alike, then measures.

    Args:
        schedule: of the clips that the curve is measured on.
        clips: their number.
        search_score, final_score: likeness to the plain run in dB of a list of recomputed steps; the first on few short
            clips, the second on what is reported.

    Raises:
        UserError: too few steps for any of them to be left out.
    """
    draw = random.Random(0)
    curve: list[Measured] = []
    if schedule.steps <= min(counts):
        raise UserError(
            f"{schedule.steps} steps are too few to leave any out; calibrate with more than {min(counts)}, or use the "
            f"preset 'off'."
        )
    counts = [count for count in counts if count < schedule.steps]
    search_score = cache(search_score)
    search_score(place_steps(schedule, counts[0]))  # makes the plain run, which is not to count as a list's time
    begun = time.monotonic()
    for place, count in enumerate(counts):
        starts = [place_steps(schedule, count), *found_before(known, schedule, count)]
        until = begun + seconds * (place + 1) / len(counts)
        best = improved(max(starts, key=search_score), schedule, search_score, until, draw)
        curve.append(Measured(best, 0.0))
        told(f"{count} steps: {best}")
    measured = [Measured(one.steps, round(final_score(one.steps), 2)) for one in curve]
    for one in measured:
        told(f"{len(one.steps)} steps: {one.psnr:.1f} dB")
    return Calibration(schedule.steps, schedule.lag, schedule.chunks, clips, tuple(measured))
