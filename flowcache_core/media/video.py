"""Pixels to files: mp4 (h264), animated WebP and GIF, each whole or not at all. And frames back from files."""

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..storage.files import write_whole
from .encoding import BT709, EXACT, UNSAID, colours_of, encode, pyav, video_stream

FORMATS = (".mp4", ".webp", ".gif")


def frames_of(pixels: Tensor) -> np.ndarray:
    """Makes images, uint8 [T, H, W, 3], of a clip [3, T, H, W] or [1, 3, T, H, W] in [-1, 1].

    Raises:
        UserError: another shape, or pixels that are not finite.
    """
    clip = pixels[0] if pixels.ndim == 5 and pixels.shape[0] == 1 else pixels
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] == 0:
        raise UserError(f"The video has shape {list(pixels.shape)}, expected one clip [3, frames, height, width].")
    if not torch.isfinite(clip).all():
        raise UserError("The video holds NaN or infinite pixels; check the latents that it was decoded from.")
    return ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu().numpy()


def enlarged(frames: np.ndarray, times: int) -> np.ndarray:
    """Images [T, H, W, 3] with every pixel `times` as wide and high."""
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def save_video(frames: np.ndarray, path: Path | str, fps: int = 16) -> Path:
    """Writes images, uint8 [T, H, W, 3], in the format that the path's ending names: .mp4, .webp or .gif.

    An mp4 of odd width or height repeats its last column or row.

    Raises:
        UserError: another ending, a folder that cannot be written to, or (mp4) no `av` package.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"The video is called {path.name}; expected a name that ends in {', '.join(FORMATS)}.")
    write = _write_mp4 if path.suffix.lower() == ".mp4" else _write_animation
    return write_whole(path, lambda partial: write(frames, partial, fps))


def save_animation(images: Sequence[Image.Image], path: Path | str, fps: int) -> Path:
    """Writes pictures of the same size as an animated .webp or .gif; errors as for `save_video`."""
    return save_video(np.stack([np.asarray(image.convert("RGB")) for image in images]), path, fps)


def read_video(path: Path | str | BinaryIO, start: float = 0.0, duration: float = 0.0) -> np.ndarray:
    """Reads the frames of a video, uint8 [T, H, W, 3], by what it says its colours mean and with exact rounding.

    A stream that was cut short is read up to its last whole frame. Frames that the file says are to be turned are.

    Args:
        path: a file's path, or an open file.
        start, duration: what to read, in seconds; a duration of 0 reads to the end.

    Raises:
        UserError: no `av` package, no video, or no frame where it was asked for.
    """
    av = pyav()
    name = "The video" if hasattr(path, "read") else Path(path).name
    try:
        with opened(path) as file:
            _go_to(file, start)
            frames = [_pixels(frame) for frame in _between(_whole_frames(file, av.FFmpegError), start, duration)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(f"{name} cannot be read as a video ({error}); give an mp4, webm or gif file.") from error
    if not frames:
        where = f" from second {start:g} on" if start else ""
        raise UserError(f"{name} has no whole frame of video{where}; give another file.")
    return np.stack(frames)


def frame_rate(path: Path | str | BinaryIO) -> Fraction:
    """Frames a second that a video has on average, by what its file says; 1 where it says nothing."""
    with opened(path) as file:
        return Fraction(file.streams.video[0].average_rate or 1)


def opened(path: Path | str | BinaryIO):
    """Opens a video for reading. One that was cut inside the header of a fragment cannot be opened as a file that one
    may seek in, but as a stream it can."""
    av = pyav()
    source = path if hasattr(path, "read") else str(path)
    try:
        return av.open(source)
    except av.InvalidDataError:
        return av.open(source, options={"seekable": "0"})


def _go_to(file, start: float) -> None:
    """Seeks the last key frame before a time in seconds."""
    if start:
        stream = file.streams.video[0]
        file.seek(int(start / stream.time_base), stream=stream)


def _between(frames, start: float, duration: float):
    for frame in frames:
        if duration and frame.time is not None and frame.time >= start + duration:
            return
        if not start or (frame.time is not None and frame.time >= start):
            yield frame


def _whole_frames(file, ends: type[Exception]):
    with suppress(ends):  # where it was cut
        yield from file.decode(video=0)


def _pixels(frame) -> np.ndarray:
    said = frame.colorspace if frame.colorspace != UNSAID else colours_of(frame.height)
    matrix, other = (1, 5) if said == BT709 else (5, 1)
    how = {"src_colorspace": matrix, "dst_colorspace": other, "interpolation": EXACT}
    pixels = frame.reformat(format="rgb24", **how).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))


def _write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    with pyav().open(str(path), "w") as container:
        stream = video_stream(container, Fraction(fps), frames.shape)
        encode(stream, frames)
        container.mux(stream.encode())


def _write_animation(frames: np.ndarray, path: Path, fps: int) -> None:
    images = [Image.fromarray(image) for image in frames]
    how = {"quality": 85, "method": 3} if path.suffix.lower() == ".webp" else {"optimize": False}
    # A GIF's clock counts hundredths of a second: rounding each frame by itself would let it drift.
    ends = [round(100 * (i + 1) / fps) * 10 for i in range(len(images))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, **how)
