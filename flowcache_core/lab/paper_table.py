"""The paper's tables, from what was measured."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..media.metrics import psnr, ssim
from .likeness import Spread
from .markdown import markdown
from .paper_rows import Row
from .perceptual import st_lpips, vmaf

MOST = 100.0  # dB, of equal videos

# How alike a video [3, T, H, W] in [0, 1] is to another one, by the table's name for it. A metric more is a line more,
# and its figure of the paper a field of `Published`.
METRICS: dict[str, Callable[[Tensor, Tensor], float | None]] = {
    "SSIM": ssim,
    "PSNR": lambda video, plain: min(psnr(video, plain), MOST),
    "ST-LPIPS": lambda video, plain: _of_pixels(st_lpips, video, plain),
    "VMAF": lambda video, plain: _of_pixels(vmaf, video, plain),
}
DIGITS = {"SSIM": 4, "PSNR": 2, "ST-LPIPS": 4, "VMAF": 1}


@dataclass
class Figures:
    """Of a row, one entry a prompt.

    Attributes:
        seconds: of the run.
        flops: floating-point operations of the network.
        device_bytes: allocated on the device at most, 0 where that is no CUDA device.
        alike: to the unaccelerated video, by metric; empty for that row itself.
    """

    row: Row
    seconds: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    device_bytes: list[int] = field(default_factory=list)
    alike: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Takes the likeness of one more video."""
        for name, value in values.items():
            self.alike.setdefault(name, []).append(value)


def _of_pixels(metric: Callable[[Tensor, Tensor], Spread | None], video: Tensor, plain: Tensor) -> float | None:
    """None where the metric has nothing to say."""
    spread = metric(video[None] * 2 - 1, plain[None] * 2 - 1)
    return spread.mean if spread else None


def likeness_of(video: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """Measures frames, uint8 [T, H, W, 3], by all metrics."""
    one, other = (torch.from_numpy(frames).movedim(-1, 0).float() / 255.0 for frames in (video, plain))
    measured = {name: metric(one, other) for name, metric in METRICS.items()}
    return {name: value for name, value in measured.items() if value is not None}


def table(figures: list[Figures]) -> str:
    """Writes a table, a row a method, with the paper's figures beside; the first row is the unaccelerated one."""
    names = ["method", "seconds", "speedup", "PFLOPs", "peak GiB", *METRICS]
    names += [f"paper: {name}" for name in ("PFLOPs", "speedup", "VBench", "LPIPS", "SSIM", "PSNR")]
    if not figures[0].seconds:
        return "No prompt has the videos of all rows yet."
    first = float(np.mean(figures[0].seconds))
    rows = []
    for one in figures:
        seconds, peak, paper = float(np.mean(one.seconds)), max(one.device_bytes), one.row.published
        cells = [one.row.name, f"{seconds:.1f}", f"{first / seconds:.2f}x", f"{np.mean(one.flops) / 1e15:.4g}"]
        cells.append(f"{peak / 2**30:.1f}" if peak else "")
        cells += [f"{np.mean(one.alike[name]):.{DIGITS[name]}f}" if name in one.alike else "" for name in METRICS]
        cells += [
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (paper.pflops, ".0f"), (paper.speedup, ".2f"), (paper.vbench, ".2f"), (paper.lpips, ".4f"),
                (paper.ssim, ".4f"), (paper.psnr, ".2f"),
            )
        ]  # fmt: skip
        rows.append(cells)
    return markdown(names, rows) + f"\n\nMeans over {len(figures[0].seconds)} videos; the peak is the largest."
