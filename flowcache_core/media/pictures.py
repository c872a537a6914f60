"""What a run did, drawn: chunk x step maps, history over time, runs side by side. Pillow only.

Pictures are 800 pixels wide, on white; colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import shortened
from ..report import Report, byte_unit, megabytes
from .likeness import Likeness
from .video import enlarged

WIDTH, MARGIN = 800, 32
LEFT, RIGHT = 76, WIDTH - MARGIN  # where maps and charts begin, right of their axis labels, and end
CHART_HEIGHT = 150
INK, FAINT, RULE, PAPER = "#1f2937", "#6b7280", "#e5e7eb", "#ffffff"
RECOMPUTED, REUSED = "#0072b2", "#f4dfb0"
RUN_COLOURS = ("#56606e", "#0072b2", "#d55e00", "#009e73")
FINE = 2  # everything is drawn this much larger and then scaled down, for smooth edges


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        name: a few words.
        report: what it did.
        frames: its video, uint8 [T, H, W, 3].
        facts: short lines to print beside its frames.
    """

    name: str
    report: Report
    frames: np.ndarray
    facts: Sequence[str] = ()


class Canvas:
    """A sheet that is written from top to bottom; `y` is where the next part goes. Lengths are in final pixels."""

    def __init__(self, longest: int):
        self.image = Image.new("RGB", (WIDTH * FINE, longest * FINE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y: float = MARGIN

    def text(self, x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "la") -> float:
        """Writes a line and returns its width. The anchor is Pillow's: l, m, r and a (top), m, s, d (bottom)."""
        font = ImageFont.load_default(size * FINE)
        self.draw.text((x * FINE, y * FINE), words, colour, font, anchor)
        return font.getlength(words) / FINE

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str, round: float = 0) -> None:
        edges = tuple(int(v * FINE + 0.5) for v in (x0, y0, x1, y1))
        self.draw.rounded_rectangle(
            (edges[0], edges[1], max(edges[0], edges[2] - 1), max(edges[1], edges[3] - 1)), round * FINE, colour
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1, dash: float = 0) -> None:
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            if not dash:
                self.draw.line((x0 * FINE, y0 * FINE, x1 * FINE, y1 * FINE), colour, int(width * FINE))
                continue
            for start in np.arange(x0, x1, 2 * dash):  # dashed lines are level
                self.draw.line(
                    (start * FINE, y0 * FINE, min(start + dash, x1) * FINE, y0 * FINE), colour, int(width * FINE)
                )

    def paste(self, x: float, y: float, frame: np.ndarray, side: float) -> None:
        """Pastes a frame [H, W, 3], `side` wide, with its pixels kept square and sharp."""
        height, width = frame.shape[:2]
        size = (int(side * FINE), int(side * FINE * height / width))
        self.image.paste(Image.fromarray(frame).resize(size, Image.Resampling.NEAREST), (int(x * FINE), int(y * FINE)))

    def title(self, words: str, note: str = "") -> None:
        """Writes the sheet's first line, and a smaller one below it."""
        self.text(MARGIN, self.y, words, 22)
        self.y += 34
        if note:
            self.text(MARGIN, self.y, note, 13, FAINT)
            self.y += 26

    def heading(self, words: str, note: str = "") -> None:
        width = self.text(MARGIN, self.y, words, 16)
        self.text(MARGIN + width + 12, self.y + 3, note, 12, FAINT)
        self.y += 28

    def sideways(self, x: float, middle: float, words: str) -> None:
        """Writes a line that runs upwards, centred on `middle`."""
        font = ImageFont.load_default(12 * FINE)
        strip = Image.new("RGB", (int(font.getlength(words)) + 4, 18 * FINE), PAPER)
        ImageDraw.Draw(strip).text((2, 0), words, FAINT, font)
        strip = strip.rotate(90, expand=True)
        self.image.paste(strip, (int(x * FINE), int(middle * FINE - strip.height / 2)))

    def numbered(self, count: int, at: Callable[[int], float], words: str) -> None:
        """Numbers `count` places, from 1, along the bottom edge of what was drawn, and writes below what they are."""
        for place in _ticks(count, 9):
            self.text(at(place), self.y + 5, str(place + 1), 12, FAINT, "ma")
        self.text((LEFT + RIGHT) / 2, self.y + 22, words, 12, FAINT, "ma")

    def axes(self, peak: float, places: int, words: str) -> Callable[[float, float], tuple[float, float]]:
        """Draws the axes of a chart of values up to `peak`, and returns where on the sheet a value at a place lies."""
        most, marks = axis_marks(peak)
        self.y += CHART_HEIGHT
        bottom = self.y

        def at(place: float, value: float) -> tuple[float, float]:
            x = LEFT + (RIGHT - LEFT) * place / max(1, places - 1)
            return x, bottom - CHART_HEIGHT * max(0.0, value) / most

        for mark in marks:
            y = at(0, mark)[1]
            self.line([(LEFT, y), (RIGHT, y)], RULE)
            self.text(LEFT - 8, y, f"{mark:g}", 12, FAINT, "rm")
        self.numbered(places, lambda place: at(place, 0)[0], words)
        return at

    def finish(self) -> Image.Image:
        height = int(self.y + MARGIN - 12)
        return self.image.crop((0, 0, WIDTH * FINE, height * FINE)).resize((WIDTH, height), Image.Resampling.LANCZOS)


def report_picture(report: Report) -> Image.Image:
    """Draws a run: its figures, a chunk x step map for each branch, the history over time. RGB, 800 pixels wide."""
    canvas = Canvas(1000 + 520 * max(1, len(report.decisions)))
    canvas.title("FlowCache report", shortened(report.settings, 100))
    _tiles(canvas, _figures(report))
    for branch in report.decisions:
        _decision_map(canvas, report, branch)
    if report.history:
        _history_chart(canvas, [("in use", report, RECOMPUTED)])
    return canvas.finish()


def comparison_picture(title: str, subtitle: str, runs: Sequence[Run], tiles: Sequence[tuple[str, str]]) -> Image.Image:
    """Draws runs of the same video: figures, frames, the map of the run that saved most, histories. 800 pixels wide.

    Args:
        tiles: the figures on top, each a large value and what it is.
    """
    canvas = Canvas(2400)
    canvas.title(title, subtitle)
    _tiles(canvas, tiles)
    _filmstrips(canvas, runs)
    saver = min(runs, key=lambda run: run.report.forwards_executed)
    for branch in saver.report.decisions:
        _decision_map(canvas, saver.report, branch, of=saver.name)
    _history_chart(canvas, [(run.name, run.report, colour) for run, colour in zip(runs, RUN_COLOURS, strict=False)])
    return canvas.finish()


def side_by_side(clips: Sequence[tuple[str, np.ndarray]], chunk_frames: int, times: int = 4) -> list[Image.Image]:
    """Puts clips, uint8 [T, H, W, 3] of one size, next to each other: one picture a frame, with names and a clock.

    Args:
        chunk_frames: pixel frames of a chunk, for the clock.
        times: how many times larger frames are shown.
    """
    large = [enlarged(frames, times) for _, frames in clips]
    _, height, width, _ = large[0].shape
    gap, top, bottom = 16, 30, 24
    size = (len(clips) * (width + gap) + gap, top + height + bottom)
    sheet = Image.new("RGB", size, PAPER)
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(12)
    for number, (name, _) in enumerate(clips):
        draw.text((gap + number * (width + gap), 7), name, RUN_COLOURS[number % len(RUN_COLOURS)], font)
    pictures = []
    for frame in range(min(len(frames) for frames in large)):
        picture = sheet.copy()
        for number, frames in enumerate(large):
            picture.paste(Image.fromarray(frames[frame]), (gap + number * (width + gap), top))
        # The first chunk is three frames shorter than the others: its first latent frame stands for one pixel frame.
        clock = f"frame {frame + 1} of {len(large[0])}, chunk {(frame + 3) // chunk_frames + 1}"
        ImageDraw.Draw(picture).text((gap, top + height + 5), clock, FAINT, small)
        pictures.append(picture)
    return pictures


def filmstrip(frames: np.ndarray, count: int = 3) -> Image.Image:
    """Frames of a clip, uint8 [T, H, W, 3], evenly spaced and side by side; the last one is the clip's last."""
    count = min(count, len(frames))
    picked = [frames[(number + 1) * len(frames) // count - 1] for number in range(count)]
    return Image.fromarray(np.ascontiguousarray(np.concatenate(picked, axis=1)))


def likeness_picture(found: Likeness) -> Image.Image:
    """Draws PSNR and SSIM of each frame of two videos. RGB, 800 pixels wide."""
    canvas = Canvas(800)
    canvas.title("How alike the videos are")
    canvas.y += 10
    best = max([one for one in found.psnr if np.isfinite(one)], default=0.0)
    shown = [one if np.isfinite(one) else best for one in found.psnr]
    equal = sum(not np.isfinite(one) for one in found.psnr)
    note = f"dB; {equal} equal frames have no figure" if equal else "dB"
    _frames_chart(canvas, "PSNR", note, shown, RECOMPUTED)
    _frames_chart(canvas, "SSIM", "1 is equal", found.ssim, RUN_COLOURS[2])
    return canvas.finish()


def _frames_chart(canvas: Canvas, name: str, note: str, values: Sequence[float], colour: str) -> None:
    """A line through a value of each frame."""
    canvas.heading(name, note)
    at = canvas.axes(max([*values, 1e-3]), len(values), "frame")
    canvas.line([at(frame, value) for frame, value in enumerate(values)], colour, 2)
    canvas.y += 56


def _figures(report: Report) -> list[tuple[str, str]]:
    fewer = report.forwards_total / max(1, report.forwards_executed)
    return [
        (f"{fewer:.1f}x", "fewer forwards"),
        (f"{report.forwards_executed:,}", f"of {report.forwards_total:,} forwards"),
        (f"{report.seconds:.1f} s", f"overhead {report.overhead:.1%}"),
        (megabytes(report.history_bytes_peak), f"of {megabytes(report.history_bytes_unbounded)} history"),
    ]


def _tiles(canvas: Canvas, figures: Sequence[tuple[str, str]]) -> None:
    gap = 12
    width = (WIDTH - 2 * MARGIN - gap * (len(figures) - 1)) / len(figures)
    for number, (value, meaning) in enumerate(figures):
        x = MARGIN + number * (width + gap)
        canvas.box(x, canvas.y, x + width, canvas.y + 64, "#f3f6f9", round=8)
        canvas.text(x + 14, canvas.y + 9, value, 23, RECOMPUTED)
        canvas.text(x + 14, canvas.y + 41, meaning, 12, FAINT)
    canvas.y += 64 + 28


def _decision_map(canvas: Canvas, report: Report, branch, of: str = "") -> None:
    rows = report.decisions[branch]
    chunks, steps = sorted(rows), max(len(row) for row in rows.values())
    owner = f" ({of})" if of else f" (branch {branch})" if len(report.decisions) > 1 else ""
    canvas.heading(f"What each chunk recomputed{owner}")
    x: float = RIGHT
    for words, colour in (("reused", REUSED), ("recomputed", RECOMPUTED)):
        x -= ImageFont.load_default(12).getlength(words)
        canvas.text(x, canvas.y - 24, words, 12)
        canvas.box(x - 19, canvas.y - 23, x - 6, canvas.y - 10, colour, round=2)
        x -= 34
    cell = min(18, 340 / len(chunks))
    wide = (RIGHT - LEFT) / steps
    seam_x, seam_y = (1.0 if wide > 5 else 0.0), (1.5 if cell > 6 else 0.0)
    for line, chunk in enumerate(chunks):
        y = canvas.y + line * cell
        for step, again in enumerate(rows[chunk]):
            x = LEFT + step * wide
            canvas.box(x, y, x + wide - seam_x, y + cell - seam_y, RECOMPUTED if again else REUSED)
    for line in _ticks(len(chunks), int(340 // max(cell, 18)), last=True):
        canvas.text(LEFT - 8, canvas.y + (line + 0.5) * cell, str(chunks[line] + 1), 12, FAINT, "rm")
    canvas.sideways(MARGIN - 4, canvas.y + len(chunks) * cell / 2, "chunk")
    canvas.y += len(chunks) * cell
    canvas.numbered(steps, lambda step: LEFT + (step + 0.5) * wide, "denoising step of the chunk")
    canvas.y += 56


def _history_chart(canvas: Canvas, lines: Sequence[tuple[str, Report, str]]) -> None:
    canvas.heading("Memory of the attention history")
    ticks = max(len(report.history) for _, report, _ in lines)
    unbounded = max(report.history_bytes_unbounded for _, report, _ in lines)
    peak = max(max(report.history_bytes_peak for _, report, _ in lines), unbounded, 1)
    size, unit = byte_unit(peak)
    canvas.sideways(MARGIN - 4, canvas.y + CHART_HEIGHT / 2, f"history, {unit}")
    at = canvas.axes(peak / size, ticks, "tick (every active chunk takes one step)")
    y = at(0, unbounded / size)[1]
    canvas.line([(LEFT, y), (RIGHT, y)], FAINT, 1, dash=4)
    canvas.text(LEFT + 6, y + 4, f"room for the whole history: {megabytes(unbounded)}", 12, FAINT)
    for number, (_, report, colour) in enumerate(lines):  # wider ones below, so that equal lines all show
        points = [at(tick, used / size) for tick, (_, used) in enumerate(report.history)]
        canvas.line(points, colour, 2 * (len(lines) - number))
    canvas.y += 48
    x: float = LEFT
    for words, report, colour in lines:
        canvas.box(x, canvas.y + 3, x + 18, canvas.y + 6, colour)
        x += 24 + canvas.text(x + 24, canvas.y - 4, f"{words}: peak {megabytes(report.history_bytes_peak)}", 12) + 24
    canvas.y += 28


def _filmstrips(canvas: Canvas, runs: Sequence[Run]) -> None:
    canvas.heading("The same video")
    count, gap, names = 6, 6, 178
    side = (WIDTH - 2 * MARGIN - names + gap) / count - gap
    frames = [round(i * (len(runs[0].frames) - 1) / (count - 1)) for i in range(count)]
    for number, frame in enumerate(frames):
        canvas.text(MARGIN + names + number * (side + gap) + side / 2, canvas.y, f"frame {frame + 1}", 12, FAINT, "ma")
    canvas.y += 20
    for run, colour in zip(runs, RUN_COLOURS, strict=False):
        canvas.text(MARGIN, canvas.y + 2, run.name, 15, colour)
        for line, fact in enumerate(run.facts):
            canvas.text(MARGIN, canvas.y + 24 + 16 * line, fact, 12, FAINT)
        for number, frame in enumerate(frames):
            shown = run.frames[min(frame, len(run.frames) - 1)]
            canvas.paste(MARGIN + names + number * (side + gap), canvas.y, shown, side)
        canvas.y += max(24 + 16 * len(run.facts), side * run.frames.shape[1] / run.frames.shape[2]) + 10
    canvas.y += 18


def _ticks(count: int, most: int, last: bool = False) -> list[int]:
    """Which of `count` places to number: the first and then even steps of 1, 2, 4, 5, 8, 10, … places."""
    steps = (times * 10**power for power in range(9) for times in (1, 2, 4, 5, 8))
    step = next(step for step in steps if count / step <= max(1, most))
    places = [place for place in range(count) if place == 0 or (place + 1) % step == 0]
    if last and places[-1] != count - 1 and count - 1 - places[-1] > step / 2:
        places.append(count - 1)
    return places


def axis_marks(peak: float) -> tuple[float, list[float]]:
    """Finds the top of an axis that holds `peak`, and its marks."""
    step = 10.0 ** np.floor(np.log10(peak / 2))
    step = float(next(step * times for times in (1, 2, 5, 10) if peak / (step * times) <= 4.5))
    count = int(np.ceil(peak * 1.02 / step))
    return count * step, [mark * step for mark in range(count + 1)]
