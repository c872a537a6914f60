"""The bench's charts: likeness over speedup, and a long run's time and memory over its chunks.

Matplotlib draws them, which `make bench` installs and nothing outside `lab` needs. It is imported where something is
drawn, so that the rest of `lab` runs without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 150  # an inch
# Okabe and Ito's, ours darkest; a curve is told by its mark as well.
COLOURS = (
    "#000000",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a6d3b",
    "#7f7f7f",
    "#b3a100",
    "#6a3d9a",
)
FAINT, RULE, AIM = "#6b7280", "#e5e7eb", "#d55e00"
MARKS = ("o", "s", "D", "^", "x")
CEILING = 60  # dB; what is nearer than that is as good as equal
SPEEDS = (1, 1.5, 2, 3, 4, 6, 8, 10, 12, 16, 20, 30, 50)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under a name; the first curve of a chart is drawn thickest and on top."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves of PSNR over speedup.

    Attributes:
        name: of what is shown.
        curves: the same ones, in the same order, in every panel.
        aims: (speedup, dB) to be reached, drawn as rings.
        floor: dB that rounding to bfloat16 alone leaves; None where that was not measured.
    """

    name: str
    curves: Sequence[Curve]
    aims: Sequence[tuple[float, float]] = ()
    floor: float | None = None


def likeness_chart(title: str, subtitle: str, panels: Sequence[Panel]) -> Figure:
    """Draws PSNR in dB over speedup on a logarithmic axis, panels below one another."""
    figure, every = _page(title, subtitle, len(panels))
    for axes, panel in zip(every, panels, strict=True):
        _draw_panel(axes, panel)
    every[-1].set_xlabel("faster than the plain run")
    handles = {label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    curves, aims = panel.curves, panel.aims
    count = len(curves)
    for number, curve in enumerate(curves):
        if not curve.points:
            continue
        speeds, levels = zip(*sorted(curve.points), strict=True)
        axes.plot(
            speeds,
            [min(level, CEILING) for level in levels],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            linewidth=3 if number == 0 else 1.5,
            markersize=8 if number == 0 else 6,
            zorder=count - number + 2,
            clip_on=False,
            label=curve.name,
        )
    if aims:
        speeds, levels = zip(*aims, strict=True)
        axes.plot(speeds, levels, "o", color=AIM, fillstyle="none", markersize=9, label="to be reached")
    if panel.floor is not None:
        axes.axhline(panel.floor, color=FAINT, linestyle="--", linewidth=1, label="rounded to bfloat16, by itself")
    every = [speed for curve in curves for speed, _ in curve.points] + [speed for speed, _ in aims] or [2.0]
    slowest, fastest = min(1.0, *every), 1.06 * max(every)
    axes.set_xscale("log")
    axes.set_xlim(slowest, fastest)
    marks = [speed for speed in SPEEDS if slowest <= speed <= fastest]
    axes.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set_ylabel(f"PSNR, dB (at most {CEILING})")
    axes.set_title(panel.name, loc="right", fontsize=9, color=FAINT)
    axes.grid(True, color=RULE)


def long_run_chart(seconds: Sequence[float], history: Sequence[int], resident: Sequence[int]) -> Figure:
    """Draws time a chunk, history and process memory over the chunks of a long run."""
    figure, (time, memory) = _page(
        f"A run of {len(seconds):,} chunks with a bounded history",
        "Budget of 3 clean chunks, positions relative to the window, one clip.",
        2,
    )
    chunks = range(1, len(seconds) + 1)
    milliseconds = [1000 * s for s in seconds]
    time.plot(chunks, milliseconds, color="#9ecae1", linewidth=0.7, label="each chunk")
    label = f"mean of {_stretch(seconds)} chunks"
    time.plot(chunks, _smoothed(milliseconds), color=COLOURS[1], linewidth=2, label=label)
    # Single slow chunks (another process, a garbage collection) may run out of the top.
    time.set_ylim(0, 1.2 * sorted(milliseconds)[math.ceil(0.995 * len(milliseconds)) - 1])
    memory.plot(chunks, [size / 2**20 for size in history], color=COLOURS[2], linewidth=2, label="history in use")
    memory.plot(chunks, [size / 2**20 for size in resident], color=COLOURS[1], linewidth=2, label="whole process")
    memory.set_ylim(0, 1.2 * max(resident) / 2**20)
    for axes, unit in ((time, "milliseconds a chunk"), (memory, "memory, MB")):
        axes.set_xlim(1, len(seconds))
        axes.set_xlabel("chunk")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(True, axis="y", color=RULE)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, frameon=False, fontsize=9)
    return figure


def _page(title: str, subtitle: str, rows: int) -> tuple[Figure, Sequence[Axes]]:
    """Makes a figure with a title, and its axes below one another."""
    from matplotlib.figure import Figure

    figure = Figure((8, 6.4 if rows == 1 else 8), dpi=DOTS, layout="constrained")
    every = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    every[0].set_title(f"{title}\n", loc="left", fontsize=14)
    above = {"xycoords": "axes fraction", "xytext": (0, 9), "textcoords": "offset points"}
    every[0].annotate(subtitle, (0, 1), fontsize=9, color=FAINT, **above)
    for axes in every:
        axes.tick_params(colors=FAINT, labelsize=9, length=0)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    return figure, every


def _stretch(values: Sequence[float]) -> int:
    return max(1, len(values) // 40)


def _smoothed(values: Sequence[float]) -> list[float]:
    width = _stretch(values)
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def scale_chart(report: dict) -> Figure:
    """Draws where a chunk's time goes on a 24 GB card, plain and with preset and budget, from `lab.scale`'s report."""
    from .roofline import RTX_4090

    card = RTX_4090.name
    shown = [row for row in report["rows"] if (row["preset"], row["budget"]) == ("plain", None)]
    rows = [row for plain in shown for row in (plain, _lightest(report, plain))]
    figure, (axes,) = _page(
        "Where a chunk's time goes",
        f"Least time by the roofline on an {card}, mean over a minute. Not measured.",
        1,
    )
    figure.set_figheight(1.5 + 0.26 * len(rows))
    names = ("matrix products", "attention", "elementwise and copies", "cutting the history")
    shares = [_shares(row, card) for row in rows]
    for number, (name, colour) in enumerate(zip(names, (COLOURS[1], COLOURS[6], COLOURS[5], COLOURS[2]), strict=True)):
        left = [sum(parts[:number]) for parts in shares]
        axes.barh(range(len(rows)), [parts[number] for parts in shares], left=left, color=colour, label=name)
    for place, row in enumerate(rows):
        total = row["chunk"]["seconds"][card]
        axes.text(1.01, place, f"{total:,.1f} s" if total < 100 else f"{total:,.0f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _lightest(report: dict, plain: dict) -> dict:
    """The same model at `balanced` with a budget, or plain with one where the preset changes nothing; without one where
    it keeps no history."""
    same = [row for row in report["rows"] if (row["model"], row["size"]) == (plain["model"], plain["size"])]
    bounded = {row["preset"]: row for row in same if row["budget"] is not None}
    shown = bounded or {row["preset"]: row for row in same}
    return shown.get("balanced", shown["plain"])


def _shares(row: dict, card: str) -> list[float]:
    chunk, cut = row["chunk"]["seconds_by_kind"][card], row["cut"]["seconds_by_kind"][card]
    parts = [chunk[kind] - cut[kind] for kind in ("product", "attention", "elementwise")]
    parts.append(sum(cut.values()))
    return [part / sum(parts) for part in parts]


def _label(row: dict) -> str:
    """What a row shows, below a plain one that names the model."""
    width, height = row["size"]
    how = row["preset"] + ("" if row["budget"] is None else f", budget {row['budget']}")
    first = (row["preset"], row["budget"]) == ("plain", None)
    return f"{row['model']}, {width}x{height}: plain" if first else how
