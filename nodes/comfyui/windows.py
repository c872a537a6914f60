"""A long video window after window, each decoded and its end encoded again, as SkyReels-V2's upstream makes it."""

from dataclasses import replace

import torch
from torch import Tensor

from ...flowcache_core.engine.windows import window_sizes
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.wan import FRAME_STRIDE
from .checks import pixel_frames, rounded_notes
from .extend import Extension, Sampling, extend


def extend_in_windows(
    model, vae, asked: Extension, how: Sampling, start: Tensor | None, frames: int, window: int, overlap: int
) -> Tensor:
    """Makes a video [frames, height, width, 3], begun with the end of `start` where that is given.

    Args:
        asked: of all windows; each has its own seed, chunks and prefix.
        how: a window is denoised; where its lag is 0, all its frames are one chunk.
        frames, window, overlap: frames of the video, of a window, and taken over from the window before.

    Raises:
        UserError: a start of another size, or windows that do not fill chunks.
    """
    width, height = asked.size
    if overlap >= window:
        raise UserError(f"The overlap is {overlap} of a window's {window} frames; set a smaller overlap.")
    known = {"frames": frames, "window": window, "overlap": overlap}
    asked = replace(asked, notes=[*asked.notes, *rounded_notes(FRAME_STRIDE, 1, **known)])
    if start is not None and (start.shape[1], start.shape[2]) != (height, width):
        raise UserError(f"The start is {start.shape[2]}x{start.shape[1]}, the video {width}x{height}; scale the start.")
    images = torch.empty(0, height, width, 3) if start is None else start
    sizes = window_sizes(*(latent_frames(count) for count in (frames, window, overlap)))
    for number, size in enumerate(sizes):
        taken = latent_frames(min(overlap, len(images))) if len(images) else 0
        given = pixel_frames(taken)
        prefix = vae.encode(images[-given:, :, :, :3]) if given else None
        new = size - taken
        if new < 1:
            raise UserError(
                f"The video has {frames} frames, and its first {given} are those that the start ends with; set frames "
                f"above {given}."
            )
        each = how.chunk_frames if how.lag else new
        if new % each:
            more, less = FRAME_STRIDE * (-new % each), FRAME_STRIDE * (new % each)
            raise UserError(
                f"Window {number + 1} makes {FRAME_STRIDE * new} frames, and with a lag it must be chunks of "
                f"{FRAME_STRIDE * each}; make that window {more} longer or {less} shorter, or set lag 0."
            )
        sampling = replace(how, chunk_frames=each, condition=how.condition if given else 0.0)
        part = replace(asked, seed=(asked.seed + number) % 2**64, chunks=new // each, prefix=prefix)
        made = vae.decode(extend(model, part, sampling).latent).flatten(0, -4)[given:]
        images = torch.cat([images, made.to(images)]) if len(images) else made
    return images


def latent_frames(frames: int) -> int:
    """Counts the latent frames that so many pixel frames become."""
    return (frames - 1) // FRAME_STRIDE + 1
