"""How alike runs are, and how good each is by itself.

Latents become pixels by the demo's linear codec, which network and VAE were trained on. The VAE's decoder is the same
map, learned, and takes longer than generating; `bench` compares both on one clip.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..demo import decode
from ..demo.codec import TIME, LinearCodec
from ..demo.detector import detect
from ..demo.train_network import FRAMES_PER_CHUNK
from ..media.metrics import psnr, ssim

CHUNK_PIXEL_FRAMES = TIME * FRAMES_PER_CHUNK


@dataclass(frozen=True)
class Spread:
    """One figure of every clip. A few clips may have parted from the run that they are compared with: the median is
    beside the mean to tell."""

    each: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.each))

    @property
    def median(self) -> float:
        return float(np.median(self.each))

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN of a single clip."""
        count = len(self.each)
        return float(np.std(self.each, ddof=1) / count**0.5) if count > 1 else float("nan")

    def as_dict(self) -> dict:
        clips = [round(value, 4) for value in self.each]
        return {"mean": self.mean, "median": self.median, "error": self.error, "clips": clips}


@dataclass(frozen=True)
class Likeness:
    """To another run of the same clips: PSNR in dB, and SSIM, at most 1, mean over the clips."""

    spread: Spread
    ssim: float

    @property
    def psnr(self) -> float:
        return self.spread.mean


@dataclass(frozen=True)
class Quality:
    """Of a run by itself, means over the clips.

    Attributes:
        detector: share of frames with the captioned colour and kind, 0 to 1.
        detector_first, detector_last: the same in the first and in the last chunk.
        growth: area of the shapes in the last quarter over that in the first.
        jerk: change of velocity from frame to frame, pixels.
    """

    detector: float
    detector_first: float
    detector_last: float
    growth: float
    jerk: float

    @property
    def drift(self) -> float:
        """How much of the detector's share is lost from the first chunk to the last."""
        return self.detector_first - self.detector_last


@cache
def codec() -> LinearCodec:
    return LinearCodec.fit()


def pixels(latents: Tensor) -> Tensor:
    """Latents [clips, 16, T, h, w] to pixels [clips, 3, 4T - 3, 8h, 8w] in [-1, 1]."""
    return codec().decode(latents).clamp(-1, 1)


def pixels_by_vae(latents: Tensor) -> Tensor:
    """As `pixels`, by the VAE that ships."""
    return torch.stack([decode(latent[None], FRAMES_PER_CHUNK) for latent in latents])


def likeness(made: Tensor, other: Tensor) -> Likeness:
    """Pixels [clips, 3, T, H, W] of two runs; SSIM is taken of every fourth frame, one for each latent frame."""
    pairs = zip(made[:, :, ::TIME], other[:, :, ::TIME], strict=True)
    return Likeness(decibels(made, other), float(np.mean([ssim(a, b, span=2.0) for a, b in pairs])))


def decibels(made: Tensor, other: Tensor) -> Spread:
    """PSNR of pixels [clips, 3, T, H, W]; equal clips, which would be infinite, count as 100."""
    return Spread([min(psnr(a, b, span=2.0), 100.0) for a, b in zip(made, other, strict=True)])


def quality(made: Tensor, captions: list[str]) -> Quality:
    """Pixels [clips, 3, T, H, W] against their captions."""
    found = [detect(clip, caption) for clip, caption in zip(made, captions, strict=True)]

    def share(part: slice) -> float:
        return torch.stack([one.per_frame[part].mean() for one in found]).mean().item()

    return Quality(
        float(np.mean([one.score for one in found])),
        share(slice(None, CHUNK_PIXEL_FRAMES - TIME + 1)),
        share(slice(-CHUNK_PIXEL_FRAMES, None)),
        _mean([one.growth for one in found]),
        _mean([one.jerk for one in found]),
    )


def _mean(values: list[float]) -> float:
    """Of the clips in which there was something to see."""
    seen = [value for value in values if np.isfinite(value)]
    return float(np.mean(seen)) if seen else float("nan")
