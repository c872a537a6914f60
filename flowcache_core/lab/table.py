"""The bench's tables and their places: `python -m flowcache_core.lab.table` writes them there.

docs/benchmark.md gets the aims and every figure, the README a summary.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..report import megabytes
from ..storage.files import write_whole
from . import packages
from .aims import aims, at
from .markdown import markdown
from .methods import FEWER, OURS, PUBLISHED

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TITLES = {
    "magi": "MAGI-1's schedule (64 steps, 4 chunks at once)",
    "skyreels": "SkyReels-V2's schedule (50 steps, a chunk every 5 ticks; plain recomputes the window at every tick)",
    "causal": "Causal, 4 steps (the demo model is not distilled: it shows cost, not quality)",
}
SUMMARY_SPEEDS = {"magi": (3, 4, 6), "skyreels": (4, 6, 8)}
COLUMNS = (
    "method",
    "setting",
    "faster",
    "forwards",
    "PSNR, dB",
    "median",
    "teacher-forced, dB",
    "median of that",
    "SSIM",
    "by VAE, dB",
    "to converged, dB",
    "caption found",
    "overhead",
)
# Of how a run looks, see `looks.Looks`: by the column's name its key and its form.
LOOKS = {
    "ST-LPIPS": ("st_lpips", ".4f"),
    "VMAF": ("vmaf", ".1f"),
    "motion, pixels a frame": ("motion", ".3f"),
    "jumps at borders": ("jumps", ".2f"),
    "colour drift of 255": ("colour", ".2f"),
}


def table(report: dict) -> str:
    """Markdown: aims and whether they were reached, and folded away what was measured on and every figure."""
    of_parts = (_packages, _long_run, _short, _cut, _compiled, _host, _throughput)
    parts = [_machine(report), *_points(report), *(part(report) for part in of_parts)]
    figures = "\n\n".join(part for part in parts if part)
    return f"{_aims(report)}\n\n<details>\n<summary>Every figure</summary>\n\n{figures}\n\n</details>"


def summary(report: dict) -> str:
    """Markdown: how alike to the plain run the best of each kind of method is at a few speeds, mean over the captions.

    Between measured points a straight line over the logarithm of speed; a dash where the speed was not measured.
    """
    kinds = {OURS: OURS, f"{FEWER}, the best solver": FEWER} | {rule: rule for rule in PUBLISHED}
    asked = [(schedule, speed) for schedule, speeds in SUMMARY_SPEEDS.items() for speed in speeds]
    rows = [
        [name, *(_whole(_best(report["points"], schedule, kind, speed)) for schedule, speed in asked)]
        for name, kind in kinds.items()
    ]
    names = ("PSNR in dB", *(f"{TITLES[schedule].split(' (')[0]}, {speed}x" for schedule, speed in asked))
    met = [aim.holds for aim in aims(report)]
    size = report["size"]
    return (
        markdown(names, rows)
        + f"\n\nDemo model, means over {size['clips']} captions of {size['chunks']} chunks, speed by the clock. "
        + f"Of the project's {len(met)} aims {sum(holds is True for holds in met)} are reached."
    )


def insert(page: str, words: str) -> str:
    """The page with what stood between the markers replaced.

    Raises:
        UserError: it lacks them.
    """
    if BEGIN not in page or END not in page or page.index(BEGIN) > page.index(END):
        raise UserError(f"The page lacks the markers {BEGIN} and {END}; put each on a line where the table belongs.")
    head, rest = page.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{words}\n\n{END}{rest.split(END, 1)[1]}"


def _best(points: list[dict], schedule: str, kind: str, speed: float) -> float | None:
    """The highest PSNR that a method whose name begins so has at a speed."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        if point["schedule"] == schedule and point["method"].startswith(kind) and point["psnr"] is not None:
            curves[point["method"]].append((point["speedup"], point["psnr"]))
    found = [at(sorted(curve), speed) for curve in curves.values()]
    return max((level for level in found if level is not None), default=None)


def _whole(level: float | None) -> str:
    return "–" if level is None else f"{level:.0f}"


def _machine(report: dict) -> str:
    machine, size = report["machine"], report["size"]
    return (
        f"Measured by `make bench` on {machine['cores']} cores of {machine['processor']}, torch {machine['torch']}: "
        f"{size['clips']} clips of {size['chunks']} chunks, means; FlowCache's times are medians of {size['pairs']} "
        "runs in alternation with the plain one, the others' are of one run of all clips. Latents become pixels by the "
        "linear map that the VAE learned; 'by VAE' is its own decoder's, of the first clip, because it takes long. "
        f"Teacher-forced: every chunk over the plain run's history. {_floors(report)} The "
        f"converged run takes eight times the steps and has {size['converged_clips']} of the clips, "
        f"{size['converged_chunks']} chunks of each. ST-LPIPS is 0 where equal. VMAF is the model without enhancement "
        "gain, over the first clips: read it beside the plain run's score against itself; it is blind to colours. "
        "Motion is the distance of optical flows where something moves; jumps are the change from chunk to chunk over "
        "that inside of chunks; colour drift is how far the mean colour of the last chunk is from the first one's."
    )


def _floors(report: dict) -> str:
    """Says what rounding alone does."""
    floors = [
        f"{floor['mean']:.1f} dB mean and {floor['median']:.1f} median at {floor['setting']} ({schedule})"
        for schedule in TITLES
        if (floor := report["checks"].get(schedule, {}).get("bfloat16_floor_psnr"))
    ]
    return f"Ours with weights and velocities rounded to bfloat16, to itself: {', '.join(floors)}." if floors else ""


def _aims(report: dict) -> str:
    rows = [[aim.name, aim.wanted, aim.reached, aim.verdict] for aim in aims(report)]
    left_out = "; ".join(report["left_out"])
    return (
        "**Aims** (leads are the smallest over the measured points of the curves)\n\n"
        + markdown(("aim", "wanted", "reached", "holds"), rows)
        + (f"\n\nFor want of time left out: {left_out}." if left_out else "")
    )


def _points(report: dict) -> Iterable[str]:
    for schedule, title in TITLES.items():
        rows = sorted((point for point in report["points"] if point["schedule"] == schedule), key=_order)
        if rows:
            yield f"**{title}**\n\n" + markdown(COLUMNS, [_row(point) for point in rows])
            looks = [[row["method"], row["setting"], f"{row['speedup']:.1f}x", *_looks(row["looks"])] for row in rows]
            yield "How it looks and moves beside the plain run:\n\n" + markdown((*COLUMNS[:3], *LOOKS), looks)


def _looks(looks: dict) -> list[str]:
    """Means over the clips, a dash where a package was missing."""
    return [f"{looks[key]['mean']:{form}}" if looks[key] else "–" for key, form in LOOKS.values()]


def _order(point: dict) -> tuple:
    first = {"plain": 0, "history only": 1, "ours": 2}.get(point["method"], 3)
    return first, point["method"], point["speedup"]


def _row(point: dict) -> list[str]:
    return [
        point["method"],
        point["setting"],
        f"{point['speedup']:.1f}x",
        f"{point['forwards_executed']:,}",
        _spread(point, "psnr"),
        _decibels(point["psnr_median"]),
        _spread(point, "forced"),
        _decibels(point["forced_median"]),
        "" if point["ssim"] is None else f"{point['ssim']:.3f}",
        _decibels(point["psnr_vae"]),
        _decibels(point["psnr_converged"]),
        f"{point['detector']:.0%}",
        f"{point['overhead']:.1%}",
    ]


def _spread(point: dict, key: str) -> str:
    """Mean over the clips and its standard error."""
    error = point[f"{key}_error"]
    return _decibels(point[key]) + (f" ± {error:.1f}" if error else "")


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else "equal"


def _long_run(report: dict) -> str:
    run = report.get("long_run")
    if not run:
        return ""
    return (
        f"**A run of {run['chunks']:,} chunks** ({run['settings']}): median time of the last 100 chunks over that of "
        f"chunks 50 to 150 {run['last_100_over_50_to_150']:.3f}; process memory "
        f"{run['rss_growth_after_chunk_50']:+.2%} after chunk 50; "
        f"history at most {megabytes(max(run['history_bytes']))}."
    )


def _short(report: dict) -> str:
    rows = report.get("short_history", {}).get("rows")
    if not rows:
        return ""
    cells = [
        [
            row["name"],
            megabytes(row["history_bytes"]),
            f"{row['quality']['detector']:.1%}",
            f"{row['quality']['detector_first'] - row['quality']['detector_last']:+.1%}",
            _decibels(row["likeness"] and row["likeness"]["psnr"]),
            *_looks(row["looks"]),
        ]
        for row in rows
    ]
    names = ("history", "peak", "caption found", "lost from first to last chunk", "PSNR to whole history, dB", *LOOKS)
    short = report["short_history"]
    return f"**A history of {short['budget']} clean chunks, {short['chunks']} chunks long**\n\n" + markdown(
        names, cells
    )


def _packages(report: dict) -> str:
    return packages.table(report["peers"]) if "peers" in report else ""


def _host(report: dict) -> str:
    host = report.get("host")
    if not host:
        return ""
    cells = [
        [row["method"], row["setting"], "fails", "", ""]
        if row["failed"]
        else [row["method"], row["setting"], f"{row['speedup']:.2f}x", f"{row['seconds']:.2f}", _decibels(row["psnr"])]
        for row in host["rows"]
    ]
    return (
        f"**In ComfyUI, on its own path (SamplerARVideo, {host['steps']} steps, {host['chunks']} chunks)**\n\n"
        + markdown(("node", "setting", "faster", "seconds", "PSNR, dB"), cells)
    )


def _throughput(report: dict) -> str:
    found = report.get("throughput")
    if not found:
        return ""
    one, both = (sorted(seconds)[len(seconds) // 2] for seconds in found["seconds"])
    return (
        f"**Many videos ({found['videos']} of {found['chunks']} chunks, ComfyUI on the processor, a thread a worker, "
        f"{found['processors']} cores)**: {found['workers']} workers make {found['ratio']:.2f} times as many as one "
        f"({both:.1f} s instead of {one:.1f} s); processes that do nothing else, {found['bare_ratio']:.2f} times"
    )


def _cut(report: dict) -> str:
    cut = report.get("compression")
    if not cut:
        return ""
    return (
        f"**Cutting the history** takes {cut['share_of_run']:.2%} of a run. At {cut['tokens']:,} clean tokens a cut is "
        f"{cut['seconds_direct'] / cut['seconds']:.1f}x faster than the formula written out with its full matrices and "
        "takes "
        f"1/{cut['bytes_direct'] / cut['bytes']:.0f} of the memory; {cut['same']:.2%} of the kept tokens are the same."
    )


def _compiled(report: dict) -> str:
    run = report.get("compiled")
    if not run:
        return ""
    return (
        f"**With the blocks compiled** (torch.compile) a plain run of {run['chunks']} chunks, causal, takes "
        f"{run['seconds_compiled'] / run['seconds']:.2f} of its time; the first one takes {run['seconds_first']:.0f} s "
        f"with the compiling. Latents differ by {run['apart']:.0e} at most."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts the bench's tables into their pages, between the markers there.")
    parser.add_argument("--report", type=Path, default=Path("out/bench/report.json"), help="(default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmark.md"), help="for all (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="for a summary (default: %(default)s)")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    pages = {options.page: table(report), options.readme: summary(report)}
    filled = {page: insert(page.read_text(encoding="utf-8"), words) for page, words in pages.items()}
    filled[options.report.with_name("table.md")] = pages[options.page] + "\n"
    for path, words in filled.items():
        write_whole(path, partial(Path.write_text, data=words, encoding="utf-8"))


if __name__ == "__main__":
    main()
