"""Where a token stands for the network: rotary positions, counted from the video's start or from the window's."""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import Given
from .plan import MemoryPlan


class RotaryTable(Protocol):
    """A family's rotary positions.

    Attributes:
        parts: widths of a head's parts for time, rows and columns; time comes first.
    """

    @property
    def parts(self) -> tuple[int, int, int]: ...

    def angles(self, positions: Tensor, width: int) -> Tensor: ...

    def table(self, frames: Tensor, rows: int, columns: int) -> Tensor: ...


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs of x [..., tokens, D] by a table [2, ..., tokens, D / 2]; computed in float32, x's dtype out."""
    cosine, sine = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).to(x.dtype)


class Positions:
    """Rotary tables of one run.

    Where positions are relative, keys are stored without their turn in time and get it when they are read, so that no
    rounding adds up over a long run.

    Args:
        plan: of the run's memory.
        rotary: of the network.
        device: where tables are used.
    """

    def __init__(self, plan: MemoryPlan, rotary: RotaryTable, device: torch.device):
        self.plan, self.rotary, self.device = plan, rotary, device
        self.relative = plan.relative
        self.time_dims = rotary.parts[0]
        self.shift = 0  # frames by which positions are moved towards zero

        @lru_cache(2 * plan.max_active + 5)
        def table(first: int, frames: int) -> Tensor:
            return rotary.table(torch.arange(first, first + frames, device=device), *plan.grid)

        self._table = table  # by first position and number of frames

    @property
    def window(self) -> int:
        """Frames that relative positions run over, a lead not counted."""
        plan = self.plan
        return min(plan.total_chunks, plan.clean_chunks + plan.max_active) * plan.chunk_frames

    def reach(self, frames: int) -> None:
        """Moves the window, so that a video of so many frames ends inside it."""
        if self.relative:
            self.shift = max(self.shift, frames - self.plan.lead - self.window)

    def sees_end(self, chunk: int | Given) -> bool:
        """Whether a chunk looks at a given end; where positions are relative, only from within a window's length."""
        return not self.relative or self.plan.first_frame(Given.END) - self.plan.first_frame(chunk) <= self.window

    def table(self, chunk: int | Given) -> Tensor:
        """The rotary table of a chunk's tokens, [2, tokens, D / 2]."""
        moved = self.shift + (self._beyond() if chunk is Given.END else 0)
        return self._table(self.plan.first_frame(chunk) - moved, self.plan.frames_of(chunk))

    def absolute_table(self, chunk: int | Given) -> Tensor:
        """The same, counted from the start of the video."""
        return self._table(self.plan.first_frame(chunk), self.plan.frames_of(chunk))

    def still_table(self, chunk: int | Given) -> Tensor:
        """The same without a turn in time."""
        frames = self.plan.frames_of(chunk)
        return self.rotary.table(torch.zeros(frames, device=self.device), *self.plan.grid)

    def turn(self, keys: Tensor, tokens: Tensor, front: int = 0) -> Tensor:
        """Turns stored keys in time, to where they stand in the window.

        Args:
            keys: [B, heads, N, D], turned in space alone.
            tokens: [B, heads, N] their numbers in the video.
            front: so many at the beginning are of a given end.
        """
        frames = self.frames(tokens) - self.shift
        if front:
            frames[:, :, :front] -= self._beyond()
        return self._turned(keys, frames.clamp(min=0))

    def turn_absolute(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """Turns stored keys in time, to where they stand in the video."""
        return self._turned(keys, self.frames(tokens))

    def turn_back(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """Takes the turn in time from keys that stand where they do in the video."""
        return self._turned(keys, -self.frames(tokens))

    def frames(self, tokens: Tensor) -> Tensor:
        """Frames that tokens belong to."""
        return tokens // self.plan.frame_tokens

    def _beyond(self) -> int:
        """Frames by which a given end is drawn nearer, so that it stands right behind the window at the farthest."""
        if not self.relative:
            return 0
        return max(0, self.plan.first_frame(Given.END) - self.shift - self.window - self.plan.lead)

    def _turned(self, keys: Tensor, positions: Tensor) -> Tensor:
        angles = self.rotary.angles(positions, self.time_dims)
        turned = keys.clone()
        table = torch.stack([angles.cos(), angles.sin()]).float()
        turned[..., : self.time_dims] = rotate(keys[..., : self.time_dims], table)
        return turned
