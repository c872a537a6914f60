"""Measures FlowCache and its peers on the same clips: `python -m flowcache_core.lab.bench` (`make bench`).

Writes report.json, table.md and the plots. Points come in order of importance, and those for which the time does not
reach are left out and named in the report.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..demo import NETWORK_FILE, load_network
from ..models.presets import quality_settings
from ..reuse.calibration import QUALITIES
from ..settings import BY_FRAMES, HistorySettings
from ..storage.calibrations import SHIPPED, load_calibration
from ..storage.files import check_writable, write_whole
from . import charts, compression_cost, process
from .aims import FORCED, FREE, SPEED_AIMS
from .compiled import compiled_runs
from .likeness import Spread, decibels, pixels, pixels_by_vae
from .long_run import long_run
from .looks import Seen
from .methods import (
    CONVERGED,
    EVERY,
    HISTORY,
    OURS,
    PLAIN,
    converged,
    default,
    history_only,
    ours,
    peers,
    plain,
    sparing,
)
from .points import Point, References, forced, measure, window_flops
from .rounded import rounding_floor
from .runs import Clips, Method, Outcome, plain_forwards, run
from .setups import SETUPS, Setup
from .short_history import short_history
from .table import TITLES, table
from .teacher import Teacher


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        clips, chunks: of the likeness curves.
        pairs: alternating runs for time.
        settings: so many of each method's sweep.
        converged_clips, converged_chunks: the first of those, for the converged run.
        long_chunks: of the long run.
        short_clips, short_chunks: of the comparison of short histories.
        tokens: of clean history, for the cost of cutting it.
        minutes: that the whole may take.
    """

    clips: int = 16
    chunks: int = 16
    pairs: int = 5
    settings: int = 9
    converged_clips: int = 4
    converged_chunks: int = 4
    long_chunks: int = 1000
    short_clips: int = 4
    short_chunks: int = 256
    tokens: int = 8192
    minutes: float = 75.0


SMOKE = Size(
    clips=2, chunks=4, pairs=1, settings=2, converged_clips=1, converged_chunks=1, long_chunks=60, short_clips=1,
    short_chunks=8, tokens=1024, minutes=2.2,
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Of one clip, medians over runs in alternation: seconds, and the share of them outside the network."""

    seconds: float
    overhead: float


@dataclass
class Bench:
    """Collects the report.

    Attributes:
        size: how much.
        network: file of the demo's family.
        begun: when the clock was started.
        timings: of the runs in alternation, by schedule, method and setting.
    """

    size: Size
    network: Path = NETWORK_FILE
    begun: float = field(default_factory=time.monotonic)
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    checks: dict = field(default_factory=dict)
    references: dict[str, References] = field(default_factory=dict)
    timings: dict[tuple[str, str, str], Timing] = field(default_factory=dict)

    def __post_init__(self):
        self.backbone = load_network(self.network)
        self.clips = Clips.held_out(self.backbone, self.size.clips, self.size.chunks)
        self.one = Clips(self.backbone, self.clips.captions[:1], self.size.chunks)
        self.fewer = Clips(self.backbone, self.clips.captions[: self.size.converged_clips], self.size.converged_chunks)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60

    def say(self, words: str) -> None:
        print(f"{self.minutes:5.1f} min  {words}", flush=True)

    def run(self) -> dict:
        """Everything, most important first; returns what report.json holds."""
        report: dict = {"machine": process.machine(), "size": asdict(self.size)}
        run(default(SETUPS["magi"]), SETUPS["magi"], Clips(self.backbone, self.clips.captions[:1], 2))  # warm-up
        made = long_run(self.backbone, SETUPS["magi"], sparing(SETUPS["magi"]).settings, self.size.long_chunks)
        self.say(f"long run: last chunks {made.slower:.3f} times as slow, memory {made.grown:+.2%}")
        for setup in SETUPS.values():
            self.schedule(setup)
        self.checks["converged_to_half_its_steps_psnr"] = round(self.convergence(), 2)
        self.checks["balanced"] = self.balanced()
        report["compression"] = self.compression()
        report["short_history"] = self.short()
        report["compiled"] = self.compiled()
        for setup, method in self.peers():
            self.peer(setup, method)
        report["points"] = [point.as_dict() for point in self.points]
        report["long_run"] = made.as_dict()
        report["checks"] = self.checks
        report["left_out"] = self.left_out
        report["minutes"] = round(self.minutes, 2)
        report["rss_bytes_peak"] = process.resident_peak()
        return report

    def schedule(self, setup: Setup) -> None:
        """The plain and the converged run of a way of sampling, and ours."""
        methods = ours(setup)[: self.size.settings]
        alike = self.alternate(setup, [m for m in [*methods, *peers(setup, self.size.settings)] if m.timed])
        once = self.timings[setup.name, PLAIN, EVERY]
        teacher = Teacher(setup.steps)
        kept = run(history_only(), setup, self.clips, teacher.watch)  # the plain run, also where that keeps no history
        scale = once.seconds / self.timings[setup.name, HISTORY, EVERY].seconds if setup.window else 1.0
        reached = run(converged(setup), setup, self.fewer) if setup.converges else None
        self.references[setup.name] = references = References(
            plain=Seen(pixels(kept.latents)),
            teacher=teacher,
            converged=pixels(reached.latents) if reached else None,
            forwards=plain_forwards(setup, self.clips.chunks),
            seconds=kept.seconds * scale,
            half_seconds=kept.seconds / 2,
        )
        self.checks[setup.name] = {"plain_seconds_of_one_clip": round(once.seconds, 4)}
        floor = rounding_floor(methods[0], setup, self.clips)
        self.checks[setup.name]["bfloat16_floor_psnr"] = {"setting": methods[0].setting} | floor.as_dict()
        first = measure(plain(setup), setup, self.clips, kept, references)
        if setup.window:
            assert alike is not None
            self.points.append(replace(first, method=HISTORY, setting=EVERY, free=alike))
            first.flops = window_flops(setup, self.clips)
            first.seconds, first.forwards_executed = references.seconds, references.forwards
            first.history_bytes_peak = 0
            self.checks[setup.name]["history_only_to_plain_psnr"] = alike.mean
        first.speedup, first.overhead = 1.0, once.overhead
        self.points.append(first)
        shown = pixels_by_vae(kept.latents[:1]) if setup.converges else None
        for method in methods:
            outcome = run(method, setup, self.clips)
            point = self.point(setup, method, outcome)
            if method is methods[0] and shown is not None:
                point.psnr_vae = decibels(pixels_by_vae(outcome.latents[:1]), shown).mean

    def alternate(self, setup: Setup, methods: list[Method]) -> Spread | None:
        """Fills `timings` with runs of one clip in alternation with the plain one; returns how alike history only is to
        the plain run, where that keeps none."""
        seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        overheads: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        latents = {}
        for number in range(self.size.pairs):
            others = [history_only()] if setup.window and number < 2 else []
            for method in [plain(setup), *others, *methods]:
                outcome = run(method, setup, self.one)
                key = setup.name, method.name, method.setting
                seconds[key].append(outcome.seconds)
                overheads[key].append(outcome.report.overhead)
                latents[method.name] = outcome.latents
        for key, values in seconds.items():
            self.timings[key] = Timing(statistics.median(values), statistics.median(overheads[key]))
        return decibels(pixels(latents[HISTORY]), pixels(latents[PLAIN])) if setup.window else None

    def point(self, setup: Setup, method: Method, outcome: Outcome) -> Point:
        references = self.references[setup.name]
        point = measure(method, setup, self.clips, outcome, references)
        point.forced = forced(method, setup, self.clips, references)
        if timing := self.timings.get((setup.name, method.name, method.setting)):
            plain_seconds = self.timings[setup.name, PLAIN, EVERY].seconds
            point.speedup, point.overhead, point.timed = plain_seconds / timing.seconds, timing.overhead, "pairs"
        self.points.append(point)
        self.say(
            f"{setup.name:9} {method.name:22} {method.setting:16} "
            f"{point.forwards_total / point.forwards_executed:5.1f}x fewer, "
            f"{point.psnr:5.1f} dB" + (f", teacher-forced {point.forced.mean:5.1f}" if point.forced else "")
        )
        return point

    def balanced(self) -> dict | None:
        """What the shipped calibration says of `balanced`, and what held-out captions give; None where it reaches that
        with every step alone."""
        shipped = load_calibration(SHIPPED)
        predicted = shipped.choose(QUALITIES["balanced"])
        if predicted is None:
            return None
        setting = f"{len(predicted.steps)} steps"
        ours_so_far = [p for p in self.points if (p.schedule, p.method) == ("magi", OURS)]
        point = next((p for p in ours_so_far if p.setting == setting), None)
        if point is None:
            method = Method(OURS, setting, quality_settings("balanced"))
            point = self.point(SETUPS["magi"], method, run(method, SETUPS["magi"], self.clips))
        error = point.free.error if point.free else math.nan
        found = {"setting": setting, "chunks": shipped.chunks, "predicted_psnr": predicted.psnr, "psnr": point.psnr}
        return found | {"standard_error": round(error, 2)}

    def peers(self) -> Iterable[tuple[Setup, Method]]:
        """All peers of all ways of sampling, in turn."""
        sweeps = [[(setup, method) for method in peers(setup, self.size.settings)] for setup in SETUPS.values()]
        for place in range(max(map(len, sweeps))):
            for sweep in sweeps:
                yield from sweep[place : place + 1]

    def peer(self, setup: Setup, method: Method) -> None:
        """One point, if the time reaches for half of the steps."""
        if self.minutes + self.references[setup.name].half_seconds / 60 > self.size.minutes:
            self.left_out.append(f"{setup.name}: {method.name}, {method.setting}")
            return
        self.point(setup, method, run(method, setup, self.clips))

    def convergence(self) -> float:
        """How alike half the converged run's steps come to it, dB: the first chunk of one clip, MAGI-1's schedule."""
        setup, reached = SETUPS["magi"], self.references["magi"].converged
        assert reached is not None
        half = replace(converged(setup), steps=CONVERGED * setup.steps // 2)
        shown = pixels(run(half, setup, replace(self.fewer, captions=self.fewer.captions[:1], chunks=1)).latents)
        return decibels(shown, reached[:1, :, : shown.shape[2]]).mean

    def compression(self) -> dict:
        setup = SETUPS["magi"]
        method = default(setup)
        short = replace(method, settings=replace(method.settings, history=HistorySettings(SHORT_BUDGET, BY_FRAMES)))
        with compression_cost.Stopwatch() as watch:
            outcome = run(short, setup, replace(self.one, chunks=max(2 * SHORT_BUDGET + 2, self.one.chunks)))
        cost = compression_cost.cut_cost(self.size.tokens)
        self.say(f"a cut at {cost.tokens} tokens: {cost.seconds_direct / cost.seconds:.1f}x faster than written out")
        return {"share_of_run": round(watch.seconds / outcome.seconds, 5), **asdict(cost)}

    def compiled(self) -> dict | None:
        found = compiled_runs(replace(self.one, chunks=2), SETUPS["causal"], self.size.pairs)
        if found is None:
            self.left_out.append("compiled blocks: no C++ compiler is installed")
            return None
        self.say(f"compiled: {found.seconds / found.seconds_compiled:.2f}x as fast")
        return asdict(found)

    def short(self) -> dict:
        setup = SETUPS["magi"]
        clips = Clips.held_out(self.backbone, self.size.short_clips, self.size.short_chunks)
        rows = short_history(setup, clips, sparing(setup).settings, SHORT_BUDGET)
        for row in rows:
            self.say(
                f"{row.name:24} detector {row.quality.detector:.1%}"
                + (f", {row.likeness.psnr:.1f} dB" if row.likeness else "")
            )
        return {
            "budget": SHORT_BUDGET,
            "chunks": clips.chunks,
            "clips": len(clips.captions),
            "rows": [row.as_dict() for row in rows],
        }


SHORT_BUDGET = 3


def write(report: dict, out: Path, pictures: Path | None = None) -> None:
    """report.json, table.md and the plots; the plots also into `pictures`."""
    words = json.dumps(finite(report), indent=1, allow_nan=False) + "\n"
    write_whole(out / "report.json", lambda partial: partial.write_text(words))
    write_whole(out / "table.md", lambda partial: partial.write_text(table(report) + "\n"))
    drawn = {f"bench_{name}": _likeness_chart(report, name) for name in SETUPS}
    run_of_many = report["long_run"]
    drawn["bench_long_run"] = charts.long_run_chart(
        run_of_many["seconds_per_chunk"], run_of_many["history_bytes"], run_of_many["rss_bytes"]
    )
    for folder in [out, *([pictures] if pictures else [])]:
        for name, figure in drawn.items():
            write_whole(folder / f"{name}.png", figure.savefig)


def finite(told):
    """The same with None for every number that JSON has no word for: sizes and motion of shapes that none has seen."""
    if isinstance(told, dict):
        return {name: finite(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [finite(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


def _likeness_chart(report: dict, schedule: str):
    points = [point for point in report["points"] if point["schedule"] == schedule and point["psnr"] is not None]
    names = [OURS, *sorted({point["method"] for point in points} - {OURS})]

    def curves(key: str) -> list[charts.Curve]:
        rows = [point for point in points if point[key] is not None]
        return [charts.Curve(name, [(r["speedup"], r[key]) for r in rows if r["method"] == name]) for name in names]

    wanted = SPEED_AIMS.get(schedule, ())
    size, floor = report["size"], report["checks"][schedule]["bfloat16_floor_psnr"]["mean"]
    return charts.likeness_chart(
        f"Likeness over speedup: {TITLES[schedule].split(' (')[0]}",
        f"demo model, means of {size['clips']} clips of {size['chunks']} chunks, {report['machine']['cores']} cores",
        [
            charts.Panel("free runs", curves(FREE), [(faster, free) for faster, _, free in wanted], floor),
            charts.Panel(
                "teacher-forced: each chunk over the plain run's history",
                curves(FORCED),
                [(faster, forced) for faster, forced, _ in wanted],
            ),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--smoke", action="store_true", help="little of everything, in three minutes")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="a second folder for the plots")
    parser.add_argument("--network", type=Path, default=NETWORK_FILE, help="another network of the demo's family")
    options = parser.parse_args()
    check_writable(options.out / "report.json")
    import matplotlib.figure  # noqa: F401 - where it is missing, that is said before the work and not after it

    bench = Bench(SMOKE if options.smoke else Size(), options.network)
    report = bench.run()
    write(report, options.out, options.pictures)
    print(table(report))
    print(f"\n{options.out}: report.json, table.md and plots, after {bench.minutes:.1f} minutes")


if __name__ == "__main__":
    main()
