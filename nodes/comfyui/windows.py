"""A long video window after window, each decoded and its end encoded again, as SkyReels-V2's upstream makes it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...flowcache_core.engine.windows import window_sizes
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.families import family
from ...flowcache_core.models.memory import FRAME_STRIDE
from . import patch as host
from .extend import Extension, Sampling, extend


@dataclass(frozen=True)
class Windows:
    """Frames of the video, of a window, and taken over from the window before; width and height in pixels."""

    frames: int
    window: int
    overlap: int
    width: int
    height: int


@dataclass(frozen=True)
class WindowSampling:
    """How a window is denoised; see `extend.Sampling`."""

    steps: int
    guidance: float
    shift: float
    lag: int
    condition: float


def extend_in_windows(
    model, vae, asked: Extension, video: Windows, how: WindowSampling, start: Tensor | None
) -> Tensor:
    """Makes a video [frames, height, width, 3], begun with the end of `start` where that is given.

    Raises:
        UserError: a start of another size, or windows that do not fill chunks.
    """
    usual = family(host.family_of(model))
    if start is not None and (start.shape[1], start.shape[2]) != (video.height, video.width):
        raise UserError(
            f"The start is {start.shape[2]}x{start.shape[1]}, the video {video.width}x{video.height}; scale the start."
        )
    images = torch.empty(0, video.height, video.width, 3) if start is None else start
    sizes = window_sizes(*(latent_frames(count) for count in (video.frames, video.window, video.overlap)))
    for number, size in enumerate(sizes):
        taken = latent_frames(min(video.overlap, len(images))) if len(images) else 0
        given = FRAME_STRIDE * taken - (FRAME_STRIDE - 1) if taken else 0
        prefix = vae.encode(images[-given:, :, :, :3]) if given else None
        new = size - taken
        each = usual.chunk_frames if how.lag else new
        if new < 1 or new % each:
            raise UserError(
                f"Window {number + 1} has {new} new frames, which do not fill chunks of {each}; change the length."
            )
        sampling = Sampling(
            usual.shifted_levels(how.steps, how.shift), each, how.lag, usual.solver(how.steps), how.guidance,
            seeing="joint", condition=how.condition if given else 0.0,
        )  # fmt: skip
        window = replace(asked, seed=(asked.seed + number) % 2**64, chunks=new // each, prefix=prefix)
        made = vae.decode(extend(model, window, sampling).latent).flatten(0, -4)[given:]
        images = torch.cat([images, made.to(images)]) if len(images) else made
    return images


def latent_frames(frames: int) -> int:
    """Counts the latent frames that so many pixel frames become."""
    return (frames - 1) // FRAME_STRIDE + 1
