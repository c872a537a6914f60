"""Thumbnails for the template browser: 16 moments of what a workflow made, or, where its model is too large to run
here, the schedule that it will run.

The host looks for <workflow>.jpg beside <workflow>.json and shows it as a square.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowcache_core import checkpoints
from flowcache_core.media.pictures import RECOMPUTED, REUSED
from flowcache_core.models.families import family, family_preset
from flowcache_core.models.presets import DEFAULT_PRESET
from flowcache_core.reuse.policies import DriftPolicy
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HistorySettings

SIDE, GRID, SEAM = 512, 4, 4
NIGHT, INK, FAINT = "#14181f", "#f3f4f6", "#9aa4b2"
FINE = 2  # drawn this much larger and then scaled down, for smooth edges
CHUNKS = 9  # drawn of a schedule
BADGE = 72  # pixels from the top that the page may lay a badge over


def of_videos(videos: list[np.ndarray]) -> Image.Image:
    """16 moments, evenly spaced, shared by the videos. Each is uint8 [T, H, W, 3]."""
    sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
    side = (SIDE - (GRID - 1) * SEAM) // GRID
    shares = np.array_split(np.arange(GRID * GRID), len(videos))
    moments = [
        video[moment]
        for video, share in zip(videos, shares, strict=True)
        for moment in np.linspace(0, len(video) - 1, len(share)).astype(int)
    ]
    for place, moment in enumerate(moments):
        down, across = divmod(place, GRID)
        square = moment[:, -moment.shape[0] :]  # of two videos side by side the right one
        tile = Image.fromarray(square).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (across * (side + SEAM), down * (side + SEAM)))
    return sheet


def of_family(name: str, title: str, preset: str = DEFAULT_PRESET) -> Image.Image:
    """The schedule of a family's recommended settings: a row a chunk, a column a tick, pale where a step is reused, or
    may be.

    Args:
        name: a key of `checkpoints.FAMILIES`.
        title: of the workflow.
        preset: of its FlowCache node.
    """
    usual = family(name)
    schedule = ChunkSchedule(CHUNKS, usual.steps, min(usual.lag, usual.steps))
    policy = family_preset(preset, name, 0, HistorySettings()).reuse.policy(schedule)
    recomputed, rest = policy.recomputed(schedule.steps) or frozenset(), ", pale ones reused"
    if isinstance(policy, DriftPolicy):
        recomputed, rest = (
            {*range(policy.warmup), *([schedule.steps - 1] if policy.last else [])},
            ", pale ones by drift",
        )
    side = SIDE * FINE
    sheet = Image.new("RGB", (side, side), NIGHT)
    draw = ImageDraw.Draw(sheet)
    for y, words, colour, size in ((BADGE + 54, title, INK, 40), (BADGE + 86, checkpoints.FAMILIES[name], FAINT, 20)):
        draw.text((side / 2, y * FINE), words, colour, fitting(words, size, side - 48 * FINE), "ms")
    left, top, width, height = (value * FINE for value in (32, BADGE + 108, SIDE - 64, 272))
    tick_width, row = width / schedule.ticks, height / CHUNKS
    for places in schedule:
        for place in places:
            x, y = left + place.tick * tick_width, top + place.chunk * row
            seam = FINE if tick_width > 6 * FINE else 0
            draw.rectangle(
                (x, y, x + tick_width - seam, y + row - 3 * FINE), RECOMPUTED if place.step in recomputed else REUSED
            )
    words = f"{usual.steps} steps a chunk: blue ones are computed" + ("" if usual.steps < 10 else rest)
    draw.text((side / 2, side - 28 * FINE), words, FAINT, fitting(words, 18, side - 48 * FINE), "ms")
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def fitting(words: str, size: int, width: float) -> ImageFont.ImageFont:
    """The default font, at `size` or as much smaller as the words need to fit into `width`."""
    font = ImageFont.load_default(size * FINE)
    return font.font_variant(size=min(size * FINE, size * FINE * width / font.getlength(words)))


def write(picture: Image.Image, workflow: Path) -> None:
    picture.save(workflow.with_suffix(".jpg"), quality=88, optimize=True)
