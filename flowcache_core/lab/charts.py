"""The bench's plots, 800 pixels wide: likeness over speedup, and a long run's time and memory over its chunks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..media.pictures import FAINT, INK, MARGIN, RULE, WIDTH, Canvas, axis_marks

LEFT = 76
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
CEILING = 60  # dB; what is nearer than that is as good as equal
MARKS = ("disc", "square", "diamond", "triangle", "cross")


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under a name; the first curve of a chart is drawn thickest and on top."""

    name: str
    points: Sequence[tuple[float, float]]


def likeness_chart(
    title: str, subtitle: str, curves: Sequence[Curve], aims: Sequence[tuple[float, float]] = ()
) -> Image.Image:
    """PSNR in dB over speedup on a logarithmic axis.

    Args:
        aims: (speedup, dB) to be reached, drawn as rings.
    """
    canvas = Canvas(1200)
    _title(canvas, title, subtitle)
    shown = [curve for curve in curves if curve.points]
    every = [point for curve in shown for point in curve.points] + list(aims)
    fastest, top, height, right = max(x for x, _ in every), canvas.y, 400, WIDTH - MARGIN
    slowest = min(1.0, *(x for x, _ in every))
    low = min(CEILING - 5, 5 * math.floor(min(y for _, y in every) / 5))
    high = min(CEILING, 5 * math.ceil(max(y for _, y in every) / 5))
    step = 5 if high - low <= 50 else 10
    wide = math.log(fastest * 1.06 / slowest)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * math.log(x / slowest) / wide, top + height * (high - min(y, high)) / (high - low)

    for mark in range(low, high + 1, step):
        y = at(slowest, mark)[1]
        canvas.line([(LEFT, y), (right, y)], RULE)
        canvas.text(LEFT - 8, y, str(mark), 12, FAINT, "rm")
    for times in (1, 1.5, 2, 3, 4, 6, 8, 10, 12, 16, 20, 30, 50):
        if slowest <= times <= fastest * 1.06:
            x = at(times, low)[0]
            canvas.line([(x, top), (x, top + height)], RULE)
            canvas.text(x, top + height + 6, f"{times:g}x", 12, FAINT, "ma")
    canvas.sideways(MARGIN - 16, top + height / 2, f"PSNR to the plain run, dB ({CEILING} and more: {CEILING})")
    canvas.text((LEFT + right) / 2, top + height + 26, "faster than the plain run", 12, FAINT, "ma")
    for number, curve in reversed(list(enumerate(shown))):
        points = [at(*point) for point in sorted(curve.points)]
        colour, sign = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        canvas.line(points, colour, 4 if number == 0 else 2)
        for point in points:
            _mark(canvas, *point, sign, colour, 6 if number == 0 else 4.5)
    for aim in aims:
        x, y = at(*aim)
        canvas.ring(x, y, 7, "#d55e00")
    canvas.y = top + height + 54
    _legend(canvas, [curve.name for curve in shown], bool(aims))
    return canvas.finish()


def long_run_chart(seconds: Sequence[float], history: Sequence[int], resident: Sequence[int]) -> Image.Image:
    """Time a chunk, history and process memory over the chunks of a long run."""
    canvas = Canvas(1200)
    _title(
        canvas,
        f"A run of {len(seconds):,} chunks with a bounded history",
        "Budget of 3 clean chunks, positions relative to the window, one clip.",
    )
    _panel(
        canvas,
        "milliseconds a chunk",
        [
            ("each chunk", [1000 * s for s in seconds], "#9ecae1", 1),
            (f"mean of {_stretch(seconds)} chunks", _smoothed([1000 * s for s in seconds]), "#0072b2", 3),
        ],
    )
    _panel(
        canvas,
        "memory, MB",
        [
            ("history in use", [b / 2**20 for b in history], "#d55e00", 3),
            ("whole process", [b / 2**20 for b in resident], "#0072b2", 3),
        ],
    )
    return canvas.finish()


def _panel(canvas: Canvas, unit: str, lines: Sequence[tuple[str, Sequence[float], str, float]]) -> None:
    top, height, right = canvas.y, 190, WIDTH - MARGIN
    count = max(len(values) for _, values, _, _ in lines)
    # Single slow chunks (another process, a garbage collection) may run out of the top.
    peaks = [sorted(values)[max(0, math.ceil(len(values) * 0.995) - 1)] for _, values, _, _ in lines]
    most, marks = axis_marks(max(peaks))

    def at(place: int, value: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * place / max(1, count - 1), top + height - height * min(value, most) / most

    for mark in marks:
        y = at(0, mark)[1]
        canvas.line([(LEFT, y), (right, y)], RULE)
        canvas.text(LEFT - 8, y, f"{mark:g}", 12, FAINT, "rm")
    canvas.sideways(MARGIN - 16, top + height / 2, unit)
    for _, values, colour, thick in lines:
        canvas.line([at(place, value) for place, value in enumerate(values)], colour, thick)
    for mark in [0, *(share * count // 5 for share in range(1, 6))]:
        canvas.text(at(min(mark, count - 1), 0)[0], top + height + 6, f"{max(mark, 1):,}", 12, FAINT, "ma")
    canvas.text((LEFT + right) / 2, top + height + 24, "chunk", 12, FAINT, "ma")
    canvas.y = top + height + 46
    x: float = LEFT
    for name, _, colour, _ in lines:
        canvas.box(x, canvas.y + 4, x + 18, canvas.y + 8, colour)
        x += 24 + canvas.text(x + 24, canvas.y - 2, name, 12) + 28
    canvas.y += 42


def _stretch(values: Sequence[float]) -> int:
    return max(1, len(values) // 40)


def _smoothed(values: Sequence[float]) -> list[float]:
    width = _stretch(values)
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _title(canvas: Canvas, title: str, subtitle: str) -> None:
    canvas.text(MARGIN, canvas.y, title, 20)
    canvas.y += 32
    canvas.text(MARGIN, canvas.y, subtitle, 13, FAINT)
    canvas.y += 34


def _legend(canvas: Canvas, names: Sequence[str], aims: bool) -> None:
    columns, wide = 3, (WIDTH - 2 * MARGIN) / 3
    entries = [*names, "to be reached"] if aims else list(names)
    for number, name in enumerate(entries):
        x, y = MARGIN + (number % columns) * wide, canvas.y + (number // columns) * 22
        if number == len(names):
            canvas.ring(x + 13, y + 7, 6, "#d55e00")
        else:
            colour = COLOURS[number % len(COLOURS)]
            canvas.line([(x, y + 7), (x + 26, y + 7)], colour, 4 if number == 0 else 2)
            _mark(canvas, x + 13, y + 7, MARKS[number % len(MARKS)], colour, 5)
        canvas.text(x + 34, y, name, 13, INK)
    canvas.y += 22 * math.ceil(len(entries) / columns) + 24


def _mark(canvas: Canvas, x: float, y: float, mark: str, colour: str, size: float) -> None:
    if mark == "disc":
        canvas.shape(
            [(x + size * math.cos(a / 8 * math.pi), y + size * math.sin(a / 8 * math.pi)) for a in range(16)], colour
        )
    elif mark == "square":
        canvas.box(x - size, y - size, x + size, y + size, colour)
    elif mark == "diamond":
        canvas.shape([(x - size, y), (x, y - size), (x + size, y), (x, y + size)], colour)
    elif mark == "triangle":
        canvas.shape([(x - size, y + size), (x, y - size), (x + size, y + size)], colour)
    else:
        canvas.line([(x - size, y - size), (x + size, y + size)], colour, 2)
        canvas.line([(x - size, y + size), (x + size, y - size)], colour, 2)
