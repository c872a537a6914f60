"""Finds out, once for a model, which steps to recompute for which likeness to its plain run.

calibration = calibrate(loaded.backbone, texts, decode=decode, family_name=loaded.family, chunks=8, minutes=30.0)
save_calibration(calibration, calibration_path(file), file)  # of storage.calibrations

On a few clips, lists of recomputed steps are improved by small moves; then every list is measured on other clips.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .generation import generate, schedule_numbers
from .media.metrics import psnr
from .models.families import family
from .models.presets import measured_steps
from .reuse.calibration import Calibration
from .reuse.search import COUNTS, Steps, search_calibration
from .schedule import ChunkSchedule
from .settings import OFF, Settings

# Settings, and 0 for the clips that are searched on or 1 for those that are measured on -> their pixels [clips, ...]
Make = Callable[[Settings, int], Tensor]

SEARCHED = 4  # texts, at most, that are searched on
MOST = 100.0  # dB; equal clips, which would be infinite, count as this


def calibrate(
    backbone,
    texts: Sequence[Tensor],
    *,
    decode: Callable[[Tensor], Tensor],
    family_name: str = "demo",
    steps: int | None = None,
    lag: int | None = None,
    chunks: int = 4,
    minutes: float = 10.0,
    span: float = 2.0,
    seed: int = 0,
    counts: Sequence[int] = COUNTS,
    told: Callable[[str], None] = lambda line: None,
    known: Calibration | None = None,
    **how: Any,
) -> Calibration:
    """Calibrates a model with clips of `generate`: searched on the first half of the texts, at most four, and measured
    on the others; on all of them, with other noise, where there is one.

    Args:
        backbone: runs the network, as for `generate`.
        texts: embeddings [1, tokens, width] of what is typical, one for each clip.
        decode: gives the pixels of latents [1, C, T, H, W], in any shape.
        family_name, steps, lag: as for `generate`; the calibration holds for these steps and this lag.
        chunks: of each clip.
        minutes: of searching; measuring comes on top, two lists of each length. 0 only measures steps that are spread
            by rule.
        span: largest minus smallest possible value of a pixel.
        seed: of the noise.
        counts: how many steps of a chunk are recomputed, one list each.
        told: gets a line on what was found.
        known: an earlier calibration, to begin with where it is better.
        how: further options of `generate`, such as `latent_size` or `negative`.

    Returns:
        The calibration; `storage.calibrations` writes it beside a model.

    Raises:
        UserError: no text, too few steps to leave any out, or what `generate` refuses.
    """
    if not texts:
        raise UserError("There is no text to calibrate with; give at least one embedding [1, tokens, width].")
    steps, lag = schedule_numbers(family(family_name), steps, lag)
    searched = min(SEARCHED, -(-len(texts) // 2))
    parts = (texts[:searched], texts[searched:] or texts)
    clip = partial(generate, backbone, chunks=chunks, family_name=family_name, steps=steps, lag=lag, **how)

    def make(settings: Settings, part: int) -> Tensor:
        first = seed + searched * part
        made = (clip(text=text, settings=settings, seed=first + number) for number, text in enumerate(parts[part]))
        return torch.stack([decode(one.latents) for one in made])

    return calibrate_clips(ChunkSchedule(chunks, steps, lag), make, minutes, span, counts, told, known)


def calibrate_clips(
    schedule: ChunkSchedule,
    make: Make,
    minutes: float,
    span: float = 1.0,
    counts: Sequence[int] = COUNTS,
    told: Callable[[str], None] = lambda line: None,
    known: Calibration | None = None,
    alone: float = 1.0,
) -> Calibration:
    """Calibrates a model with clips that the caller makes, which go by the number alone: the same captions and noise
    for all settings.

    Args:
        schedule: of the clips that are measured on.
        make: gives the pixels [clips, ...] of some settings; of number 0 for the search, of number 1 for the measures.
        minutes, span, counts, told, known: as for `calibrate`.
        alone: what a step costs that no other chunk recomputes with, over one in full company: 1 for a network that
            fills its device, more for a small one.

    Raises:
        UserError: too few steps for any of them to be left out.
    """
    plain = cache(partial(make, OFF))

    def score(number: int, chosen: Steps) -> float:
        expected = plain(number)
        return likeness(make(Settings(measured_steps(chosen, schedule.steps, schedule.lag)), number), expected, span)

    found = search_calibration(
        schedule, 0, partial(score, 0), partial(score, 1), 60.0 * minutes, counts, told, known, alone
    )
    return replace(found, clips=len(plain(1)))


def likeness(clips: Tensor, plain: Tensor, span: float = 1.0) -> float:
    """Measures the PSNR of pixels [clips, ...] to others, dB: the mean over the clips, each at most 100."""
    levels = [min(psnr(one, other, span=span), MOST) for one, other in zip(clips, plain, strict=True)]
    return sum(levels) / len(levels)
