"""What the bench is to reach, and what it reached: one row an aim, read off a finished report."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .methods import FEWER, OURS, THRESHOLDS

Curve = list[tuple[float, float]]  # (faster, dB), slowest first

SPEED_AIMS = {  # faster than the plain run by wall clock, PSNR to it in dB
    "magi": ((4.0, 42.0), (6.5, 38.0), (10.0, 32.0)),
    "skyreels": ((8.0, 38.0), (12.0, 30.0), (15.0, 22.95)),
}
RANGE_OF_SOLVERS, LEAD_ON_SOLVERS = (2.0, 8.0), 4.0  # fewer forwards by so much; dB
RANGE_OF_RULES, LEAD_ON_RULES = (2.0, 6.0), 8.0
OVERHEAD = 0.03
SLOWER, GROWN = 1.03, 0.01
DETECTOR_LOSS = 0.01
CUT_SHARE, CUT_FASTER, CUT_SMALLER = 0.02, 5.0, 10.0
MISPREDICTION = 2.0  # dB

DECIBELS, LEAD, SHARE, TIMES = "{:.2f} dB", "{:+.1f} dB", "{:.1%}", "{:.2f}x"


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
    """Every aim of the project that a bench's report can answer."""
    points = report["points"]
    rows = [row for schedule in SPEED_AIMS for row in _schedule(points, schedule)]
    return [*rows, *_causal(points), *_balanced(report), *_long_run(report), *_short(report), *_cut(report)]


def at(curve: Curve, faster: float) -> float | None:
    """PSNR of a curve at a speed, on straight lines over the logarithm of speed; None outside of what was measured."""
    for (x, y), (x_next, y_next) in zip(curve, curve[1:], strict=False):
        if x <= faster <= x_next:
            return y + (y_next - y) * (math.log(faster / x) / math.log(x_next / x) if x_next > x else 0.0)
    return None


def _schedule(points: list[dict], schedule: str) -> Iterable[Aim]:
    points = [point for point in points if point["schedule"] == schedule and point["psnr"] is not None]
    ours = [point for point in points if point["method"] == OURS]
    by_time = sorted((point["speedup"], point["psnr"]) for point in ours)
    for faster, wanted in SPEED_AIMS[schedule]:
        aim = _least(f"{schedule}: likeness at {faster:g}x by time", at(by_time, faster), wanted, DECIBELS)
        beyond = by_time and faster > by_time[-1][0]
        yield replace(aim, reached=f"{by_time[-1][0]:.1f}x is the fastest", holds=False) if beyond else aim
    solvers = [point for point in points if point["method"].startswith(FEWER)]
    told = f"at equal forwards, {RANGE_OF_SOLVERS[0]:g}x to {RANGE_OF_SOLVERS[1]:g}x"
    to_plain, to_converged = (_lead(ours, solvers, RANGE_OF_SOLVERS, key) for key in ("psnr", "psnr_converged"))
    yield _least(f"{schedule}: lead on the best solver of fewer steps, {told}", to_plain, LEAD_ON_SOLVERS, LEAD)
    yield _least(f"{schedule}: the same, likeness to the converged run", to_converged, 0.0, LEAD)
    for rule in THRESHOLDS:
        published = [point for point in points if point["method"] == rule]
        lead = _lead(ours, published, RANGE_OF_RULES, "psnr")
        told = f"{RANGE_OF_RULES[0]:g}x to {RANGE_OF_RULES[1]:g}x"
        yield _least(f"{schedule}: lead on {rule} at equal forwards, {told}", lead, LEAD_ON_RULES, LEAD)
    timed = [point for point in ours if point["timed"] == "pairs"]
    worst = max(timed, key=lambda point: point["overhead"], default=None)
    reached = None if worst is None else worst["overhead"]
    name = f"{schedule}: overhead" + (f" (the worst: {worst['setting']})" if worst else "")
    yield _most(name, reached, OVERHEAD, SHARE)


def _lead(ours: list[dict], others: list[dict], between: tuple[float, float], key: str) -> float | None:
    """The smallest lead in dB, at each number of forwards that the others were measured at, on the best of them."""
    curve = sorted((_fewer(point), point[key]) for point in ours if point[key] is not None)
    best: dict[float, float] = defaultdict(lambda: -math.inf)
    for point in others:
        if point[key] is not None and between[0] <= _fewer(point) <= between[1]:
            best[_fewer(point)] = max(best[_fewer(point)], point[key])
    leads = [level - reached for fewer, reached in best.items() if (level := at(curve, fewer)) is not None]
    return min(leads, default=None)


def _fewer(point: dict) -> float:
    return point["forwards_total"] / point["forwards_executed"]


def _causal(points: list[dict]) -> Iterable[Aim]:
    points = [point for point in points if point["schedule"] == "causal"]
    fewer = {point["setting"]: point for point in points if point["method"] == FEWER}
    ours = [point for point in points if point["method"] == OURS and point["setting"] in fewer]
    both = [(point, fewer[point["setting"]]) for point in ours]
    leads = [one["psnr"] - other["psnr"] for one, other in both]
    speeds = [one["speedup"] / other["speedup"] for one, other in both]
    told = "causal: against plain with as many steps fewer"
    yield _least(f"{told}, likeness", min(leads, default=None), 0.0, LEAD)
    yield _least(f"{told}, speed", min(speeds, default=None), 1.0, TIMES)


def _balanced(report: dict) -> Iterable[Aim]:
    found = report["checks"].get("balanced")
    if found and found["chunks"] != report["size"]["chunks"]:
        found = None  # differences add up over chunks, so another length is another prediction
    off = found and abs(found["predicted_psnr"] - found["psnr"])
    measured = found and f"{found['psnr']:.1f} ± {found['standard_error']:.1f}"
    told = f" ({found['predicted_psnr']:.1f} dB; {measured} measured)" if found else ""
    yield _most(f"quality balanced: off its prediction{told}", off, MISPREDICTION, DECIBELS)


def _long_run(report: dict) -> Iterable[Aim]:
    run = report["long_run"]
    slower, grown, told = run["last_100_over_50_to_150"], run["rss_growth_after_chunk_50"], f"{run['chunks']:,} chunks"
    yield _most(f"{told}: time of the last 100 over chunks 50 to 150", slower, SLOWER, "{:.3f}x")
    yield _most(f"{told}: process memory growth after chunk 50", grown, GROWN, "{:.2%}")


def _short(report: dict) -> Iterable[Aim]:
    short = report["short_history"]
    whole, ours, *others = short["rows"]
    told = f"history of {short['budget']} clean chunks, {short['chunks']} chunks long"
    lost = whole["quality"]["detector"] - ours["quality"]["detector"]
    yield _most(f"{told}: captions found less than with the whole", lost, DETECTOR_LOSS, SHARE)
    yield _most(f"{told}: drift more than with the whole", _drift(ours) - _drift(whole), DETECTOR_LOSS, SHARE)
    for other in others:
        lead = ours["likeness"]["psnr"] - other["likeness"]["psnr"]
        name = f"{told}: lead on {other['name']}, likeness to the whole"
        yield Aim(name, f"more than {LEAD.format(0.0)}", LEAD.format(lead), lead > 0.0)


def _drift(row: dict) -> float:
    return row["quality"]["detector_first"] - row["quality"]["detector_last"]


def _cut(report: dict) -> Iterable[Aim]:
    cut = report["compression"]
    told = f"a cut at {cut['tokens']:,} tokens against the formula written out"
    yield _most("cutting the history: share of a run", cut["share_of_run"], CUT_SHARE, "{:.2%}")
    yield _least(f"{told}: faster", cut["seconds_direct"] / cut["seconds"], CUT_FASTER, TIMES)
    yield _least(f"{told}: memory smaller", cut["bytes_direct"] / cut["bytes"], CUT_SMALLER, TIMES)


def _least(name: str, reached: float | None, wanted: float, form: str) -> Aim:
    words = "" if reached is None else form.format(reached)
    return Aim(name, f"at least {form.format(wanted)}", words, None if reached is None else reached >= wanted)


def _most(name: str, reached: float | None, wanted: float, form: str) -> Aim:
    words = "" if reached is None else form.format(reached)
    return Aim(name, f"at most {form.format(wanted)}", words, None if reached is None else reached <= wanted)
