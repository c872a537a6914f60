"""The bench's table, and its place in the README: `python -m flowcache_core.lab.table` writes it there."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..report import megabytes
from ..storage.files import write_whole
from .aims import aims

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TITLES = {
    "magi": "MAGI-1's schedule (64 steps, 4 chunks at once)",
    "skyreels": "SkyReels-V2's schedule (50 steps, a chunk every 5 ticks; plain recomputes the window at every tick)",
    "causal": "Causal, 4 steps (the demo model is not distilled: it shows cost, not quality)",
}
COLUMNS = (
    "method",
    "setting",
    "faster",
    "forwards",
    "PSNR, dB",
    "SSIM",
    "by VAE, dB",
    "to converged, dB",
    "caption found",
    "overhead",
)


def table(report: dict) -> str:
    """Markdown: aims and whether they were reached, and folded away what was measured on and every figure."""
    parts = [_machine(report), *_points(report), _long_run(report), _short(report), _cut(report), _host(report)]
    figures = "\n\n".join(part for part in parts if part)
    return f"{_aims(report)}\n\n<details>\n<summary>Every figure</summary>\n\n{figures}\n\n</details>"


def insert(readme: str, words: str) -> str:
    """The README with what stood between the markers replaced.

    Raises:
        UserError: it lacks them.
    """
    if BEGIN not in readme or END not in readme or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"The README lacks the markers {BEGIN} and {END}; put each on a line where the table belongs.")
    head, rest = readme.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{words}\n\n{END}{rest.split(END, 1)[1]}"


def _machine(report: dict) -> str:
    machine, size = report["machine"], report["size"]
    return (
        f"Measured by `make bench` on {machine['cores']} cores of {machine['processor']}, torch {machine['torch']}: "
        f"{size['clips']} clips of {size['chunks']} chunks, means; FlowCache's times are medians of {size['pairs']} "
        "runs in alternation with the plain one, the others' are of one run of all clips. Latents become pixels by the "
        "linear map that the VAE learned; 'by VAE' is its own decoder's, of the first clip, because it takes long. The "
        f"converged run takes eight times the steps and has {size['converged_clips']} of the clips, "
        f"{size['converged_chunks']} chunks of each. LPIPS is left out: its weights are not at hand."
    )


def _aims(report: dict) -> str:
    rows = [[aim.name, aim.wanted, aim.reached, aim.verdict] for aim in aims(report)]
    left_out = "; ".join(report["left_out"])
    return (
        "**Aims** (leads are the smallest over the measured points of the curves)\n\n"
        + _markdown(("aim", "wanted", "reached", "holds"), rows)
        + (f"\n\nFor want of time left out: {left_out}." if left_out else "")
    )


def _points(report: dict) -> Iterable[str]:
    for schedule, title in TITLES.items():
        rows = [point for point in report["points"] if point["schedule"] == schedule]
        if rows:
            yield f"**{title}**\n\n" + _markdown(COLUMNS, [_row(point) for point in sorted(rows, key=_order)])


def _order(point: dict) -> tuple:
    first = {"plain": 0, "history only": 1, "ours": 2}.get(point["method"], 3)
    return first, point["method"], point["speedup"]


def _row(point: dict) -> list[str]:
    return [
        point["method"],
        point["setting"],
        f"{point['speedup']:.1f}x",
        f"{point['forwards_executed']:,}",
        _decibels(point["psnr"]),
        "" if point["ssim"] is None else f"{point['ssim']:.3f}",
        _decibels(point["psnr_vae"]),
        _decibels(point["psnr_converged"]),
        f"{point['detector']:.0%}",
        f"{point['overhead']:.1%}",
    ]


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
        ]
        for row in rows
    ]
    names = ("history", "peak", "caption found", "lost from first to last chunk", "PSNR to whole history, dB")
    short = report["short_history"]
    return f"**A history of {short['budget']} clean chunks, {short['chunks']} chunks long**\n\n" + _markdown(
        names, cells
    )


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
        + _markdown(("node", "setting", "faster", "seconds", "PSNR, dB"), cells)
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


def _markdown(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(list(names)), *rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts the bench's table into the README, between its markers.")
    parser.add_argument("--report", type=Path, default=Path("out/bench/report.json"), help="(default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="(default: %(default)s)")
    options = parser.parse_args()
    made = table(json.loads(options.report.read_text()))
    words = insert(options.readme.read_text(), made)
    write_whole(options.report.with_name("table.md"), lambda partial: partial.write_text(made + "\n"))
    write_whole(options.readme, lambda partial: partial.write_text(words))


if __name__ == "__main__":
    main()
