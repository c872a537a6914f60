"""Two videos next to each other: pictures to look at, and how alike they are frame by frame."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .metrics import psnr, ssim

GAP = 8  # pixels between videos side by side
LINE = 2  # pixels of the line that wipes


@dataclass(frozen=True)
class Likeness:
    """PSNR in dB (infinite for equal frames) and SSIM of each frame."""

    psnr: list[float]
    ssim: list[float]

    def text(self) -> str:
        """Means and lowest values, frames counted from 1."""
        if all(math.isinf(one) for one in self.psnr):
            return f"The {len(self.psnr)} frames are equal."
        finite = [one for one in self.psnr if math.isfinite(one)]
        means = f"PSNR {sum(finite) / len(finite):.1f} dB", f"SSIM {sum(self.ssim) / len(self.ssim):.3f}"
        worst = self.psnr.index(min(finite)) + 1, self.ssim.index(min(self.ssim)) + 1
        lines = [
            f"{means[0]}, lowest {min(finite):.1f} dB in frame {worst[0]}",
            f"{means[1]}, lowest {min(self.ssim):.3f} in frame {worst[1]}",
            f"{len(self.psnr)} frames",
        ]
        equal = len(self.psnr) - len(finite)
        return "\n".join(lines) + (f", {equal} of them equal (not in the mean of PSNR)" if equal else "")


def common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts out the frames that both videos [T, H, W, 3] have.

    Raises:
        UserError: frames of different size.
    """
    if first.shape[1:] != second.shape[1:]:
        sizes = " and ".join(f"{video.shape[2]} x {video.shape[1]}" for video in (first, second))
        raise UserError(f"The videos are {sizes} pixels; scale one of them to the other's size.")
    frames = min(len(first), len(second))
    return first[:frames], second[:frames]


def likeness(first: Tensor, second: Tensor) -> Likeness:
    """Measures videos [T, H, W, 3] in [0, 1] of the same shape, at least 11 x 11 pixels."""
    pairs = [(a.movedim(-1, 0)[:, None], b.movedim(-1, 0)[:, None]) for a, b in zip(first, second, strict=True)]
    return Likeness([psnr(a, b) for a, b in pairs], [ssim(a, b) for a, b in pairs])


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Videos [T, H, W, 3] in [0, 1] next to each other, with a white gap."""
    gap = first.new_ones(len(first), first.shape[1], GAP, 3)
    return torch.cat([first, gap, second.to(first)], dim=2)


def wipe(first: Tensor, second: Tensor) -> Tensor:
    """Videos [T, H, W, 3] in [0, 1] in one: the first is left of a white line that goes from right to left and back."""
    frames, _, width, _ = first.shape
    result = second.to(first).clone()
    for frame in range(frames):
        at = round(width * (1 + math.cos(2 * math.pi * frame / frames)) / 2)
        result[frame, :, :at] = first[frame, :, :at]
        result[frame, :, at : at + LINE] = 1.0
    return result
