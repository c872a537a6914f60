"""Reads a saved video and says what a test wants to know."""

from pathlib import Path

import numpy as np

from flowcache_core.media.video import read_video


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 [T, H, W, 3]."""
    return read_video(path)


def check_video(path: Path, frames: int, size: int) -> np.ndarray:
    """Asserts length and size, that no frame is of one colour, and that the picture moves; returns the frames."""
    video = frames_of(path)
    assert video.shape == (frames, size, size, 3)
    flat = video.reshape(frames, -1).astype(np.float32)
    assert flat.std(axis=1).min() > 2
    assert np.abs(flat[0] - flat[-1]).mean() > 1
    return video
