"""Settings that do nothing though they were meant to: those that reuse nothing, why, and the nearest ones that do; a
budget that nothing is cut to."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..reuse.policies import Policy
from ..schedule import ChunkSchedule
from ..settings import Drift, Every, Fixed, Off, Reuse, Settings, Spread

FEWEST = 4  # recomputed steps of a chunk that a suggestion leaves, where there are so many


def idle_notes(reuse: Reuse, schedule: ChunkSchedule) -> list[str]:
    """Says in one line why nothing will be reused, and what setting would; says nothing where something may be, or
    nothing was asked for."""
    if isinstance(reuse, Off) or reuses(reuse, schedule):
        return []
    found = better(reuse, schedule)
    remedy = "no setting reuses any of them" if found is None else f"{_named(reuse, schedule, *found)} does"
    return [f"nothing is reused: {_why(reuse, schedule)}; {remedy}"]


def uncut_notes(
    settings: Settings, schedule: ChunkSchedule, chunk_frames: int, joint: bool, at_once: bool
) -> list[str]:
    """Says where a history budget has nothing to cut.

    Args:
        chunk_frames: latent frames of a chunk.
        joint: all chunks of a window go through the network together.
        at_once: a history over its budget is cut whether or not another chunk begins.
    """
    history = settings.history
    if not history.bounded:
        return []
    if joint:
        return ["nothing is cut: with attention joint all frames of a window see each other, and there is no history"]
    kept = history.kept_frames(chunk_frames)
    assert kept is not None
    held = f"budget of {history.budget} chunks" if history.window is None else f"window of {history.window} frames"
    if kept >= schedule.total_chunks * chunk_frames:
        return [f"nothing is cut: the {held} holds the whole video of {schedule.total_chunks} chunks"]
    last = schedule.start(schedule.indices[-1])
    clean = schedule.prefix + sum(schedule.start(one) + schedule.steps_of(one) <= last for one in schedule.indices)
    if at_once or clean * chunk_frames > kept:
        return []
    return [
        f"nothing is cut: the last chunk begins when {clean} chunks are finished, which the {held} holds; the "
        "presets high, balanced, fast and, on SkyReels-V2, the paper's cut without waiting for another chunk"
    ]


def reuses(reuse: Reuse, schedule: ChunkSchedule) -> bool:
    """Whether some step of a chunk may be reused."""
    if isinstance(reuse, Drift):
        return max(1, reuse.warmup) + int(reuse.last) < schedule.steps
    recomputed = reuse.policy(schedule).recomputed(schedule.steps)
    return recomputed is None or len(recomputed) < schedule.steps


def better(reuse: Reuse, schedule: ChunkSchedule) -> tuple[Reuse, ChunkSchedule] | None:
    """The nearest settings and schedule that reuse something, if there are any."""
    return next((pair for pair in _nearby(reuse, schedule) if reuses(*pair)), None)


def unreached_notes(policy: Policy, weighed: Sequence[float]) -> list[str]:
    """Says why a run reused nothing though its policy watched for it.

    Args:
        weighed: the least that a step added to its chunk's drift; empty where none was looked at.
    """
    threshold = getattr(policy, "threshold", 0.0)
    return [
        f"nothing was reused: a step adds {least:.3g} at least to what is watched, and the threshold is {threshold:g}; "
        f"one above {least:.3g} reuses some"
        for least in weighed
    ]


def _why(reuse: Reuse, schedule: ChunkSchedule) -> str:
    steps = schedule.steps
    if steps < 2:
        return "a chunk takes a single step, which is always recomputed"
    if isinstance(reuse, (Every, Drift)) and reuse.warmup >= steps - int(reuse.last):
        return f"the warm-up of {reuse.warmup} leaves none of a chunk's {steps} steps"
    if isinstance(reuse, Every):
        if reuse.n < 2 or reuse.n > steps:
            return f"every {reuse.n} reuses no step of {steps}"
        return f"chunks start {schedule.lag} ticks apart, which nothing from 2 to {reuse.n} divides"
    if isinstance(reuse, Spread):
        least = max(reuse.least, round(reuse.share * steps))
        return f"this quality recomputes {least} steps of a chunk, which takes {steps}"
    return f"all {steps} steps are recomputed"


def _nearby(reuse: Reuse, schedule: ChunkSchedule) -> Iterator[tuple[Reuse, ChunkSchedule]]:
    steps = schedule.steps
    if isinstance(reuse, (Every, Drift)):
        for warmup in range(min(reuse.warmup, steps) - 1, 0, -1):
            yield replace(reuse, warmup=warmup), schedule
    if isinstance(reuse, Every):
        for n in sorted(range(2, steps + 1), key=lambda n: (abs(n - reuse.n), n)):
            yield replace(reuse, n=n, warmup=min(reuse.warmup, max(1, steps - 2))), schedule
    if isinstance(reuse, (Spread, Fixed)):
        for n in range(max(2, steps // FEWEST), steps + 1):
            yield Every(n), schedule
    for lag in sorted(range(2, steps + 1), key=lambda lag: abs(lag - schedule.lag)):
        yield Every(reuse.n if isinstance(reuse, Every) and reuse.n > 1 else 2), replace(schedule, lag=lag)


def _named(reuse: Reuse, schedule: ChunkSchedule, other: Reuse, moved: ChunkSchedule) -> str:
    words = []
    if isinstance(other, Every) and not isinstance(reuse, Every):
        words.append("preset custom")
    if isinstance(other, Every) and getattr(reuse, "n", 0) != other.n:
        words.append(f"every {other.n}")
    if isinstance(other, (Every, Drift)) and getattr(reuse, "warmup", 1) != other.warmup:
        words.append(f"warmup {other.warmup}")
    if moved.lag != schedule.lag:
        words.append(f"lag {moved.lag}")
    return " with ".join([words[0], ", ".join(words[1:])] if words[1:] else words)
