"""How alike two runs look, by published measures of perception. Both come with optional packages of the lab; where one
is missing, or frames are smaller than what they look for (`LEAST`), its figure is None and the tables have a dash.

ST-LPIPS: Ghildyal and Liu, Shift-tolerant Perceptual Similarity Metric, ECCV 2022 (package stlpips_pytorch). VMAF:
Netflix, by the libvmaf inside imageio-ffmpeg's ffmpeg.
"""

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..media.video import frames_of
from .likeness import Spread

EVERY = 4  # so manieth frame is looked at
# The model without enhancement gain: the usual one rewards contrast that the reference does not have.
VMAF_MODEL = "vmaf_v0.6.1neg"
LEAST = 64  # pixels a side
ENLARGED = 256  # pixels a side: VMAF's scales reach over more pixels than the demo has


def st_lpips(made: Tensor, other: Tensor) -> Spread | None:
    """Measures the distance of pixels [clips, 3, T, H, W] in [-1, 1], a figure a clip: 0 where they are equal."""
    metric = _network() if min(made.shape[-2:]) >= LEAST else None
    if metric is None:
        return None
    with torch.no_grad():
        return Spread(
            [
                metric(one[:, ::EVERY].transpose(0, 1), two[:, ::EVERY].transpose(0, 1)).mean().item()
                for one, two in zip(made, other, strict=True)
            ]
        )


def vmaf(made: Tensor, reference: Tensor) -> Spread | None:
    """Scores pixels [clips, 3, T, H, W] in [-1, 1], a figure a clip, at most about 100. The reference against itself
    does not always have 100: its score belongs beside. Colours are not looked at: their drift is measured apart."""
    program = _ffmpeg() if min(made.shape[-2:]) >= LEAST else None
    if program is None:
        return None
    return Spread([_vmaf(program, one, two) for one, two in zip(made, reference, strict=True)])


def _vmaf(program: str, made: Tensor, reference: Tensor) -> float:
    """VMAF of a clip [3, T, H, W], mean over its frames."""
    height, width = made.shape[-2:]
    shape = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "16"]
    times = max(1, ENLARGED // min(height, width))
    larger = f"scale={times * width}:{times * height}:flags=neighbor,format=yuv420p"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("made", "reference")]
        for file, clip in zip(files, (made, reference), strict=True):
            file.write_bytes(np.ascontiguousarray(frames_of(clip)).tobytes())
        graph = (
            f"[0:v]{larger}[a];[1:v]{larger}[b];"
            f"[a][b]libvmaf=model=version={VMAF_MODEL}:n_subsample={EVERY}:log_fmt=json:log_path=scores.json"
        )
        inputs = [word for file in files for word in (*shape, "-i", str(file))]
        command = [program, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
        subprocess.run(command, check=True, cwd=folder, stdin=subprocess.DEVNULL)
        return json.loads(Path(folder, "scores.json").read_text())["pooled_metrics"]["vmaf"]["mean"]


@cache
def _ffmpeg() -> str | None:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        return None
    return get_ffmpeg_exe()


@cache
def _network() -> Callable[[Tensor, Tensor], Tensor] | None:
    with _unused_stand_ins():
        try:
            from stlpips_pytorch import stlpips
        except ImportError:
            return None
        return stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)


@contextmanager
def _unused_stand_ins() -> Iterator[None]:
    """Meanwhile, empty modules for what the metric's package imports and this network of it never uses."""
    made = {}
    for name, unused in UNUSED.items():
        try:
            importlib.import_module(name)
        except Exception:  # not installed, or a build for another torch, which fails as it likes
            made[name] = ModuleType(name)
            vars(made[name]).update(dict.fromkeys(unused))
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


UNUSED = {"torchvision": ["models"], "IPython": ["embed"], "torchsummary": ["summary"]}
