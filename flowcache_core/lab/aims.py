"""What the project promises, one short list, and what a finished bench reached of it."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .methods import CACHE_DIT, FEWER, OURS, PUBLISHED

Curve = list[tuple[float, float]]  # (faster, dB), slowest first

# Faster than the plain run by the clock: PSNR to it in dB, teacher-forced and of free runs.
SPEED_AIMS = {
    "magi": ((4.0, 58.0, 45.0), (6.5, 50.0, 40.0), (10.0, 40.0, 33.0)),
    "skyreels": ((8.0, 50.0, 42.0), (12.0, 40.0, 33.0), (15.0, 33.0, 26.0)),
}
LEADS = 6.0, 3.0  # dB at equal forwards, teacher-forced and free
RANGE = 2.0, 10.0  # fewer forwards by so much
OVERHEAD, OVERHEAD_FEW = 0.03, 0.015
FASTER = 3.0  # than another package, at equal likeness
MISPREDICTION = 2.0  # dB
LOSS = 0.01
SLOWER = 1.03

FORCED, FREE = "forced", "psnr"


@dataclass(frozen=True)
class Aim:
    """One row; `holds` is None where the report lacks what would tell."""

    name: str
    wanted: str
    reached: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        return {True: "yes", False: "**no**", None: "not measured"}[self.holds]


def aims(report: dict) -> list[Aim]:
    """Every promise that a bench's report can answer."""
    by_schedule = [row for schedule in SPEED_AIMS for row in _schedule(report["points"], schedule)]
    return [*by_schedule, *_overheads(report["points"]), _peers(report), _balanced(report), *_history(report)]


def at(curve: Curve, faster: float) -> float | None:
    """PSNR of a curve at a speed, on straight lines over the logarithm of speed; None outside of what was measured."""
    for (x, y), (x_next, y_next) in zip(curve, curve[1:], strict=False):
        if x <= faster <= x_next:
            return y + (y_next - y) * (math.log(faster / x) / math.log(x_next / x) if x_next > x else 0.0)
    return None


def faster_at(curve: Curve, level: float) -> float | None:
    """The highest speed at which a curve still has so many dB; None where none of it has."""
    reached = [x for x, y in curve if y >= level]
    for (x, y), (x_next, y_next) in zip(curve, curve[1:], strict=False):
        if y >= level > y_next:
            reached.append(x * (x_next / x) ** ((y - level) / (y - y_next)))
    return max(reached, default=None)


def _schedule(points: list[dict], schedule: str) -> Iterable[Aim]:
    points = [point for point in points if point["schedule"] == schedule and point[FREE] is not None]
    ours = [point for point in points if point["method"] == OURS]
    for faster, *wanted in SPEED_AIMS[schedule]:
        reached = [at(_curve(ours, key), faster) for key in (FORCED, FREE)]
        name = f"{schedule}, {faster:g}x by the clock: likeness teacher-forced / free"
        beyond = max((point["speedup"] for point in ours), default=math.inf) < faster
        yield _both(name, reached, wanted, "{:.1f}", beyond)
    others = {"the best solver with fewer steps": lambda name: name.startswith(FEWER)}
    others["the best published rule"] = lambda name: name in PUBLISHED
    for told, belongs in others.items():
        group = [point for point in points if belongs(point["method"])]
        leads = [_lead(ours, group, key) for key in (FORCED, FREE)]
        name = f"{schedule}: lead on {told} at equal forwards, {RANGE[0]:g}x to {RANGE[1]:g}x, teacher-forced / free"
        yield _both(name, leads, LEADS, "{:+.1f}")


def _curve(points: list[dict], key: str) -> Curve:
    return sorted((point["speedup"], point[key]) for point in points if point[key] is not None)


def _lead(ours: list[dict], others: list[dict], key: str) -> float | None:
    """The smallest lead in dB, at each number of forwards that the others were measured at, on the best of them."""
    curve = sorted((_fewer(point), point[key]) for point in ours if point[key] is not None)
    best: dict[float, float] = defaultdict(lambda: -math.inf)
    for point in others:
        if point[key] is not None and RANGE[0] <= _fewer(point) <= RANGE[1]:
            best[_fewer(point)] = max(best[_fewer(point)], point[key])
    leads = [level - reached for fewer, reached in best.items() if (level := at(curve, fewer)) is not None]
    return min(leads, default=None)


def _fewer(point: dict) -> float:
    return point["forwards_total"] / point["forwards_executed"]


def _overheads(points: list[dict]) -> Iterable[Aim]:
    timed = [point for point in points if point["method"] == OURS and point["timed"] == "pairs"]
    for few, most, told in ((False, OVERHEAD, "of many steps"), (True, OVERHEAD_FEW, "of four steps")):
        runs = [point for point in timed if (point["schedule"] == "causal") == few]
        worst = max(runs, key=lambda point: point["overhead"], default=None)
        at_worst = f" (the worst: {worst['schedule']}, {worst['setting']})" if worst else ""
        yield _most(f"overhead {told}{at_worst}", worst["overhead"] if worst else None, most, "{:.1%}")


def _peers(report: dict) -> Aim:
    """cache-dit's settings against our curve, each at its own likeness; the one that comes nearest counts."""
    told = f"faster than cache-dit at equal likeness, {RANGE[0]:g}x and up"
    rows = report.get("peers", {}).get("rows", [])
    curve = sorted((row["speedup"], row[FREE]) for row in rows if row["method"] == OURS)
    theirs = [row for row in rows if row["method"] == CACHE_DIT and row["speedup"] >= RANGE[0]]
    ratios = [ours / row["speedup"] for row in theirs if (ours := faster_at(curve, row[FREE])) is not None]
    return _least(told, min(ratios, default=None), FASTER, "{:.1f}x")


def _balanced(report: dict) -> Aim:
    found = report["checks"].get("balanced")
    if found and found["chunks"] != report["size"]["chunks"]:
        found = None  # differences add up over chunks, so another length is another prediction
    off = found and abs(found["predicted_psnr"] - found["psnr"])
    measured = found and f"{found['psnr']:.1f} ± {found['standard_error']:.1f}"
    told = f" ({found['predicted_psnr']:.1f} dB; {measured} measured)" if found else ""
    return _most(f"quality balanced: off its prediction{told}", off, MISPREDICTION, "{:.1f} dB")


def _history(report: dict) -> Iterable[Aim]:
    run = report["long_run"]
    slower = run["last_100_over_50_to_150"]
    yield _most(f"{run['chunks']:,} chunks: time of the last 100 over chunks 50 to 150", slower, SLOWER, "{:.3f}x")
    short = report["short_history"]
    whole, ours, *others = short["rows"]
    told = f"history of {short['budget']} clean chunks, {short['chunks']} chunks long"
    lost = whole["quality"]["detector"] - ours["quality"]["detector"]
    yield _most(f"{told}: captions found less than with the whole", lost, LOSS, "{:.1%}")
    yield _most(f"{told}: drift more than with the whole", _drift(ours) - _drift(whole), LOSS, "{:.1%}")
    best = max((row for row in others if row["bounded"]), key=lambda row: row["likeness"]["psnr"])
    lead = ours["likeness"]["psnr"] - best["likeness"]["psnr"]
    name = f"{told}: lead on the best other choice ({best['name']}), likeness to the whole"
    yield Aim(name, "more than +0.0 dB", f"{lead:+.1f} dB", lead > 0.0)


def _drift(row: dict) -> float:
    return row["quality"]["detector_first"] - row["quality"]["detector_last"]


def _both(name: str, reached: list[float | None], wanted: Iterable[float], form: str, beyond: bool = False) -> Aim:
    """An aim of two figures, in dB; `beyond` is a speed that no run has."""
    least = " / ".join(form.format(value) for value in wanted)
    if beyond:
        return Aim(name, f"{least} dB", "no run is so fast", False)
    words = " / ".join("–" if value is None else form.format(value) for value in reached)
    if all(value is None for value in reached):
        return Aim(name, f"{least} dB", "", None)
    fails = any(value is not None and value < least for value, least in zip(reached, wanted, strict=True))
    return Aim(name, f"{least} dB", f"{words} dB", False if fails else None if None in reached else True)


def _least(name: str, reached: float | None, wanted: float, form: str) -> Aim:
    words = "" if reached is None else form.format(reached)
    return Aim(name, f"at least {form.format(wanted)}", words, None if reached is None else reached >= wanted)


def _most(name: str, reached: float | None, wanted: float, form: str) -> Aim:
    words = "" if reached is None else form.format(reached)
    return Aim(name, f"at most {form.format(wanted)}", words, None if reached is None else reached <= wanted)
