"""Rotary position embedding over (frame, row, column), as Wan 2.1 lays it out in each attention head.

A head's width is cut into a part for time, one for rows, one for columns; inside a part, neighbouring pairs turn by
position x theta^(-2i / part). Angles are computed in float64, so that a run may be of any length.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..history.positions import IN_TORCH, RotaryProduct


class GridRotary(ABC):
    """Rotary positions over a grid of frames, rows and columns; a family says which pairs turn, and by what angles."""

    head_dim: int

    @property
    @abstractmethod
    def parts(self) -> tuple[int, int, int]:
        """Widths of the parts for time, rows and columns; they come first in a head."""

    @abstractmethod
    def angles(self, positions: Tensor, width: int) -> Tensor:
        """Positions [...] on the CPU to angles [..., width / 2] in float64."""

    def sides(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Positions of rows and columns, on the CPU."""
        return torch.arange(rows), torch.arange(columns)

    def axes(self, frames: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Cosines and sines of frames at positions [T], rows and columns, float32 [2, places, pairs], on the CPU."""
        return self._turns((frames, *self.sides(rows, columns)))

    def _turns(self, places: Sequence[Tensor]) -> list[Tensor]:
        angles = [self.angles(place, part) for place, part in zip(places, self.parts, strict=True)]
        return [torch.stack([each.cos(), each.sin()]).float() for each in angles]

    def grid(self, axes: list[Tensor]) -> Tensor:
        """Puts axes together to a table of every token, float32 [2, T * rows * columns, head_dim / 2]. Pairs that are
        not turned come last."""
        time, row, column = axes
        shape = (2, time.shape[1], row.shape[1], column.shape[1])
        spread = (time[:, :, None, None], row[:, None, :, None], column[:, None, None])
        parts = [axis.expand(*shape, -1) for axis in spread]
        unturned = self.head_dim // 2 - sum(part.shape[-1] for part in parts)
        if unturned:
            still = torch.eye(2, 1, device=time.device)[..., None, None, None]  # cosine 1, sine 0
            parts.append(still.expand(*shape, unturned))
        return torch.cat(parts, dim=-1).flatten(1, 3)

    def table(self, frames: Tensor, rows: int, columns: int) -> Tensor:
        """The table of a run of frames at positions [T], on the CPU."""
        return self.grid(self.axes(frames, rows, columns))


@dataclass(frozen=True)
class Rotary(GridRotary):
    """Wan 2.1's.

    Attributes:
        theta: of the angles.
        product: that tables are made for.
        scales: that positions of frames, rows and columns are multiplied by.

    Source: Wan 2.1, wan/modules/model.py (rope_params, rope_apply).
    """

    head_dim: int
    theta: float = 10000.0
    product: RotaryProduct = IN_TORCH
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def axes(self, frames: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Cosines and sines as in `GridRotary.axes`, of scaled positions."""
        places = (frames, *self.sides(rows, columns))
        return self._turns([place.double() * scale for place, scale in zip(places, self.scales, strict=True)])

    @property
    def parts(self) -> tuple[int, int, int]:
        """Widths of the parts for time, rows and columns."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    def angles(self, positions: Tensor, width: int) -> Tensor:
        """Positions [...] on the CPU to angles [..., width / 2] in float64."""
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        return positions.double()[..., None] * self.theta**-exponents
