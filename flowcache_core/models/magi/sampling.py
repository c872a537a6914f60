"""MAGI-1's sampler in numbers: noise levels, who sees whom, guidance, what a distilled network is told.

Time t runs from 0 (noise) to 1 (clean), as upstream counts; sigma = 1 - t. A chunk starts when the one before it has
done a quarter of its steps, so four are active at once; the quarters are called stages.

Source: MAGI-1, inference/pipeline/video_generate.py, inference/model/dit/dit_model.py and the example configs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import UserError

WINDOW = 4  # chunks that are active at once
CHUNK_FRAMES = 6  # latent frames
SHIFT = 3.0  # of the noise levels, as in Stable Diffusion 3
CLEAN_TIME = 0.9999  # at which a finished chunk's keys and values are made
NULL_TOKENS = 50  # of the empty caption
VISIBLE_CHUNKS = (5, 4, 3, 2)  # by stage: how many chunks a chunk sees, itself included
NEAR_CLEAN_TIME = 0.3  # above it a distilled network's oldest chunk is mixed with its run alone
NEAR_CLEAN_WEIGHT = 0.7  # of the run that sees the past
STEP_COUNTS = (8, 12, 16, 32, 64)

ShortOrder = Literal["8,16,16", "16,16,8"]  # of 12 steps: the lengths of each stage's three, as parts of the whole


def times(steps: int, order: ShortOrder = "8,16,16") -> list[float]:
    """Times of a chunk's steps, [steps + 1], rising from 0 to 1: even, then squared, then shifted towards noise.

    In float32, as upstream: at three quarters of the way the time is a little above 0.3, which counts as above.

    Raises:
        UserError: the steps cannot be divided into stages.
    """
    if steps < WINDOW or steps % WINDOW:
        raise UserError(f"MAGI-1 takes a multiple of {WINDOW} steps, got {steps}; published are {STEP_COUNTS}.")
    if steps == 12:
        starts = torch.linspace(0, 1, WINDOW + 1)
        parts = starts[:3] if order == "16,16,8" else starts[[0, 2, 3]]
        even = (starts[:, None] + parts / WINDOW).flatten()[: steps + 1]
    else:
        even = torch.linspace(0, 1, steps + 1)
    squared, inverse = even**2, 1.0 / SHIFT
    return (inverse * squared / (1 + (inverse - 1) * squared)).tolist()


def sigmas(steps: int, order: ShortOrder = "8,16,16") -> list[float]:
    """Gives the noise levels of a chunk's steps, [steps + 1], falling from 1 to 0."""
    return [1.0 - t for t in times(steps, order)[:-1]] + [0.0]  # float32 overshoots the last time a little


def step_size(steps: int, step: int, order: ShortOrder = "8,16,16") -> float:
    """Gives what a distilled network is told at a chunk's step: half the number of steps of this length in a run."""
    if steps != 12:
        return steps / 2
    doubled = 2 if order == "16,16,8" else 0
    return 4.0 if step % 3 == doubled else 8.0


def visible_before(step: int, steps: int, ranges: Sequence[int] = VISIBLE_CHUNKS) -> int | None:
    """Tells how many chunks before its own a chunk sees at a step; None for all of them (no ranges)."""
    if not ranges:
        return None
    if steps % len(ranges):
        raise UserError(f"{steps} steps cannot be divided among {len(ranges)} ranges of visible chunks.")
    return ranges[step // (steps // len(ranges))] - 1


@dataclass(frozen=True)
class GuidanceScales:
    """How a base network's three branches are weighed, by noise level.

    Attributes:
        times: where each entry begins, rising from 0.
        past: scale of attending to earlier chunks, an entry each.
        text: scale of the caption.
    """

    times: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    past: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)
    text: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)

    def __post_init__(self):
        if not len(self.times) == len(self.past) == len(self.text):
            raise UserError(
                f"The guidance table has {len(self.times)} times, {len(self.past)} past scales and {len(self.text)} "
                "text scales; give one of each for every entry."
            )

    def weights(self, t: float) -> dict[str, float]:
        """Weights of the branches at a time: "text" (caption and past), "past" (past alone), "alone" (neither).

        They add up to 1. An entry begins a little (1e-7) below its time.
        """
        begun = [index for index, start in enumerate(_float32(self.times)) if start < t]
        entry = begun[-1] if begun else 0
        past, text = self.past[entry], self.text[entry]
        return {"text": text, "past": past - text, "alone": 1.0 - past}


def near_clean(t: float) -> bool:
    """Tells whether the oldest active chunk of a distilled network is also run alone, and the two mixed."""
    return t > NEAR_CLEAN_TIME


def _float32(starts: Sequence[float]) -> list[float]:
    return (torch.tensor(starts, dtype=torch.float32) - 1e-7).tolist()
