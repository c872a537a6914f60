"""What likeness of single frames does not tell: whether things move as in the plain run, whether the picture jumps
where chunks meet, and whether its colours drift."""

import numpy as np
import torch
from torch import Tensor

from .likeness import CHUNK_PIXEL_FRAMES, Spread

MOVES = 0.25  # pixels a frame: what is slower counts as standing


def flows(video: Tensor) -> list[np.ndarray]:
    """Optical flow (TV-L1: Zach, Pock and Bischof 2007) of pixels [clips, 3, T, H, W] in [-1, 1].

    Returns:
        A clip each [pairs, 2, H, W], pixels a frame: from one frame to the next in the middle of every second chunk,
        as a pair takes 0.05 s.
    """
    from skimage.registration import optical_flow_tvl1

    grey = ((video.float().mean(dim=1) + 1) / 2).numpy()
    middles = range(CHUNK_PIXEL_FRAMES // 2, grey.shape[1] - 1, 2 * CHUNK_PIXEL_FRAMES)
    return [np.stack([optical_flow_tvl1(clip[at], clip[at + 1]) for at in middles]) for clip in grey]


def motion_error(made: list[np.ndarray], plain: list[np.ndarray]) -> Spread:
    """How far the flows of a run are from the plain run's, a clip each, in pixels a frame: the mean length of their
    difference where something moves in either."""
    errors = []
    for one, other in zip(made, plain, strict=True):
        moving = np.maximum(np.hypot(*one.swapaxes(0, 1)), np.hypot(*other.swapaxes(0, 1))) > MOVES
        apart = np.hypot(*(one - other).swapaxes(0, 1))
        errors.append(float(apart[moving].mean()) if moving.any() else 0.0)
    return Spread(errors)


def border_jumps(made: Tensor) -> Spread:
    """How much more pixels [clips, 3, T, H, W] change from a chunk's last frame to the next one's first than between
    other frames: 1 where a border cannot be seen. The first chunk has three pixel frames less than others.

    Raises:
        ValueError: a single chunk.
    """
    change = (made[:, :, 1:] - made[:, :, :-1]).abs().mean(dim=(1, 3, 4))
    last = CHUNK_PIXEL_FRAMES - 4  # of the first chunk, counted from 0
    border = torch.arange(change.shape[1]) % CHUNK_PIXEL_FRAMES == last % CHUNK_PIXEL_FRAMES
    if not border.any():
        raise ValueError("a border needs two chunks")
    return Spread((change[:, border].mean(dim=1) / change[:, ~border].mean(dim=1).clamp(min=1e-9)).tolist())


def colour_drift(made: Tensor) -> Spread:
    """How far the mean colour of the last chunk of pixels [clips, 3, T, H, W] in [-1, 1] is from the first one's: the
    largest difference of the three channels, in 255ths."""
    first, last = (
        part.mean(dim=(2, 3, 4)) for part in (made[:, :, : CHUNK_PIXEL_FRAMES - 3], made[:, :, -CHUNK_PIXEL_FRAMES:])
    )
    return Spread(((last - first).abs().amax(dim=1) * 127.5).tolist())
