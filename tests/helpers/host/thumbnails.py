"""Thumbnails for the template browser: 16 moments of what a workflow made, or, where its model is too large to run
here, the schedule that it will run. They move.

The host looks for <workflow>.jpg beside <workflow>.json and shows it as a square. A browser goes by what the file
holds, not by its name: here an animated WebP.
"""

from itertools import pairwise
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
PICTURES, STRIDE = 16, 2  # of a thumbnail; frames of a video from one to the next
SHOWN, HELD = 125, 1500  # milliseconds, of a picture and of a whole schedule
BADGE = 72  # pixels from the top that the page may lay a badge over


def of_videos(videos: list[np.ndarray]) -> list[Image.Image]:
    """16 moments, evenly spaced, shared by the videos, each of which plays for a while. Videos are uint8
    [T, H, W, 3]."""
    side = (SIDE - (GRID - 1) * SEAM) // GRID
    shares = np.array_split(np.arange(GRID * GRID), len(videos))
    moments = [
        (video, moment)
        for video, share in zip(videos, shares, strict=True)
        for moment in np.linspace(0, max(0, len(video) - PICTURES * STRIDE), len(share)).astype(int)
    ]
    pictures = []
    for later in range(0, PICTURES * STRIDE, STRIDE):
        sheet = Image.new("RGB", (SIDE, SIDE), NIGHT)
        for place, (video, moment) in enumerate(moments):
            down, across = divmod(place, GRID)
            frame = video[min(moment + later, len(video) - 1)]
            square = frame[:, -frame.shape[0] :]  # of two videos side by side the right one
            tile = Image.fromarray(square).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (across * (side + SEAM), down * (side + SEAM)))
        pictures.append(sheet)
    return pictures


def of_family(name: str, title: str, preset: str = DEFAULT_PRESET) -> list[Image.Image]:
    """The schedule of a family's recommended settings as it is run: a row a chunk, a column a tick, pale where a step
    is reused, or may be. The first picture is the whole of it, for what shows no others.

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
    words = f"{usual.steps} steps a chunk: blue ones are computed" + ("" if usual.steps < 10 else rest)
    draw.text((side / 2, side - 28 * FINE), words, FAINT, fitting(words, 18, side - 48 * FINE), "ms")
    seam, ticks, pictures = FINE if tick_width > 6 * FINE else 0, list(schedule), list[Image.Image]()
    for begun, done in pairwise(round(schedule.ticks * part / PICTURES) for part in range(PICTURES + 1)):
        for place in (place for places in ticks[begun:done] for place in places):
            x, y = left + place.tick * tick_width, top + place.chunk * row
            draw.rectangle(
                (x, y, x + tick_width - seam, y + row - 3 * FINE), RECOMPUTED if place.step in recomputed else REUSED
            )
        pictures.append(sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return [pictures[-1], *pictures]


def fitting(words: str, size: int, width: float) -> ImageFont.ImageFont:
    """The default font, at `size` or as much smaller as the words need to fit into `width`."""
    font = ImageFont.load_default(size * FINE)
    return font.font_variant(size=min(size * FINE, size * FINE * width / font.getlength(words)))


def write(pictures: list[Image.Image], workflow: Path) -> None:
    first, *others = pictures
    shown = [
        HELD if place in (0, len(others)) and len(pictures) > PICTURES else SHOWN for place in range(len(pictures))
    ]
    with workflow.with_suffix(".jpg").open("wb") as file:
        first.save(file, "WEBP", save_all=True, append_images=others, duration=shown, loop=0, quality=75, method=6)
