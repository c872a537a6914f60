"""Rotary position embedding over (frame, row, column), as Wan 2.1 lays it out in each attention head.

A head's width is cut into a part for time, one for rows, one for columns; inside a part, neighbouring pairs turn by
position x theta^(-2i / part). Angles are computed in float64, so that a run may be of any length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..history.positions import IN_TORCH, RotaryProduct


@dataclass(frozen=True)
class Rotary:
    """Source: Wan 2.1, wan/modules/model.py (rope_params, rope_apply)."""

    head_dim: int
    theta: float = 10000.0
    product: RotaryProduct = IN_TORCH

    @property
    def parts(self) -> tuple[int, int, int]:
        """Widths of the parts for time, rows and columns."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    def angles(self, positions: Tensor, width: int) -> Tensor:
        """Positions [...] on the CPU to angles [..., width / 2] in float64."""
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        return positions.double()[..., None] * self.theta**-exponents

    def axes(self, frames: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Cosines and sines of frames at positions [T], rows and columns, float32 [2, places, pairs], on the CPU."""
        places = (frames, torch.arange(rows), torch.arange(columns))
        return cosines([self.angles(place, part) for place, part in zip(places, self.parts, strict=True)])

    def grid(self, axes: list[Tensor]) -> Tensor:
        """Puts axes together to a table of every token, float32 [2, T * rows * columns, head_dim / 2]."""
        return grid_table(axes, self.head_dim // 2)

    def table(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        """The table of a run of frames at positions [T], on the CPU."""
        return self.grid(self.axes(frames, rows, columns))


def cosines(angles: list[Tensor]) -> list[Tensor]:
    """Cosines and sines, float32 [2, ...], of float64 angles."""
    return [torch.stack([each.cos(), each.sin()]).float() for each in angles]


def grid_table(axes: list[Tensor], pairs: int) -> Tensor:
    """Cosines and sines of every token of a grid, from those along each axis.

    Args:
        axes: of frames, rows and columns, [2, places on the axis, pairs of its part].
        pairs: of a whole head; those that are not turned come last.

    Returns:
        float32 [2, T * rows * columns, pairs].
    """
    time, row, column = axes
    shape = (2, time.shape[1], row.shape[1], column.shape[1])
    parts = [axis.expand(*shape, -1) for axis in (time[:, :, None, None], row[:, None, :, None], column[:, None, None])]
    turned = sum(part.shape[-1] for part in parts)
    if turned < pairs:
        still = torch.eye(2, 1, device=time.device)[..., None, None, None]  # cosine 1, sine 0
        parts.append(still.expand(*shape, pairs - turned))
    return torch.cat(parts, dim=-1).flatten(1, 3)
