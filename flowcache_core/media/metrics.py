"""How alike two videos are: PSNR and SSIM on decoded pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor, span: float = 1.0) -> float:
    """Measures the peak signal-to-noise ratio in dB over all pixels; infinite for equal videos.

    Args:
        a, b: pixels of the same shape.
        span: largest minus smallest possible value: 1 for [0, 1], 2 for [-1, 1].

    Raises:
        UserError: the shapes differ.
    """
    _same_shape(a, b)
    error = (a.double() - b.double()).square().mean()
    return (10.0 * torch.log10(span * span / error)).item() if error > 0 else float("inf")


def ssim(a: Tensor, b: Tensor, span: float = 1.0) -> float:
    """Measures structural similarity, at most 1: the mean over colour channels and all windows that lie inside a frame.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, Gaussian window of 11 x 11 with sigma 1.5, K1 0.01, K2 0.03.

    Args:
        a, b: clips [C, T, H, W] or [B, C, T, H, W] of the same shape, at least 11 x 11 pixels.
        span: largest minus smallest possible value: 1 for [0, 1], 2 for [-1, 1].

    Raises:
        UserError: the shapes differ, or a frame is smaller than the window.
    """
    _same_shape(a, b)
    height, width = a.shape[-2:]
    if min(height, width) < WINDOW:
        raise UserError(f"The frames are {height} x {width} pixels, SSIM needs at least {WINDOW} x {WINDOW}.")
    a, b = (video.double().reshape(-1, 1, height, width) for video in (a, b))  # every channel of every frame by itself
    parts = zip(a.split(64), b.split(64), strict=True)
    return sum(_windows(one, other, span).mean().item() * len(one) for one, other in parts) / len(a)


def _windows(a: Tensor, b: Tensor, span: float) -> Tensor:
    """SSIM of every window of planes [N, 1, H, W]."""
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return likeness / ((mean_a * mean_a + mean_b * mean_b + c1) * (variance_a + variance_b + c2))


def _blur(planes: Tensor) -> Tensor:
    """Gaussian-weighted mean of every window of planes [N, 1, H, W] -> [N, 1, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=planes.dtype) - WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SIGMA * SIGMA))
    kernel = (kernel / kernel.sum()).to(planes.device)
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UserError(
            f"The videos have shapes {list(a.shape)} and {list(b.shape)}; compare videos of the same size and length."
        )
