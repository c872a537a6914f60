"""Rotary position embedding over (frame, row, column), as Wan 2.1 lays it out in each attention head.

A head's width is cut into a part for time, one for rows, one for columns; inside a part, neighbouring pairs turn by
position x theta^(-2i / part). Angles are computed in float64, so that a run may be of any length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Source: Wan 2.1, wan/modules/model.py (rope_params, rope_apply)."""

    head_dim: int
    theta: float = 10000.0

    @property
    def parts(self) -> tuple[int, int, int]:
        """Widths of the parts for time, rows and columns."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    def angles(self, positions: Tensor, width: int) -> Tensor:
        """Positions [...] to angles [..., width / 2] in float64."""
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        return positions.double()[..., None] * self.theta**-exponents

    def table(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        """Cosines and sines of every token of a run of frames.

        Args:
            frames: [T] position of each frame.

        Returns:
            float32 [2, T * rows * columns, head_dim / 2].
        """
        at = frames.device
        places = (frames, torch.arange(rows, device=at), torch.arange(columns, device=at))
        return grid_table([self.angles(place, part) for place, part in zip(places, self.parts, strict=True)])


def grid_table(angles: list[Tensor], pairs: int | None = None) -> Tensor:
    """Cosines and sines of every token of a grid, from the angles along each axis.

    Args:
        angles: for frames, rows and columns, [places on the axis, pairs of its part].
        pairs: of a whole head, where some are not turned; those come last.

    Returns:
        float32 [2, T * rows * columns, pairs].
    """
    time, row, column = angles
    shape = (len(time), len(row), len(column))
    axes = (time[:, None, None], row[:, None], column)
    whole = torch.cat([axis.expand(*shape, -1) for axis in axes], dim=-1).flatten(0, 2)
    whole = F.pad(whole, (0, (pairs or whole.shape[-1]) - whole.shape[-1]))
    return torch.stack([whole.cos(), whole.sin()]).float()
