"""Where a token stands for the network: rotary positions, counted from the video's start or from the window's."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..schedule import Given, Rerun
from .plan import MemoryPlan

VECTOR = 8  # complex numbers in a processor's widest registers


class RotaryProduct(NamedTuple):
    """How pairs of numbers are turned; ComfyUI has it as one kernel.

    Attributes:
        table: brings cosines and sines, float32 [2, tokens, D / 2], into the form that `turn` takes.
        turn: x [B, heads, tokens, D] by such a table -> the same of x's dtype.
    """

    table: Callable[[Tensor], Tensor]
    turn: Callable[[Tensor, Tensor], Tensor]


class Rotary(Protocol):
    """A family's rotary positions, worked out on the CPU, since not every device has float64.

    Attributes:
        parts: widths of a head's parts for time, rows and columns; time comes first.
        product: that the tables are made for.
    """

    @property
    def parts(self) -> tuple[int, int, int]: ...

    @property
    def product(self) -> RotaryProduct: ...

    def axes(self, frames: Tensor, rows: int, columns: int) -> list[Tensor]: ...

    def grid(self, axes: list[Tensor]) -> Tensor: ...


class RotaryTables:
    """Tables of a run's tokens: those of its axes go to the device once, and are put together there.

    Args:
        rotary: of the network.
        grid: rows and columns of tokens of a frame.
        device: where tables are used.
        frames: that are known to be asked for; more are made when they are.
        kept: tables that are kept at once.
    """

    def __init__(self, rotary: Rotary, grid: tuple[int, int], device: torch.device, frames: int = 1, kept: int = 8):
        self.rotary, self.size, self.device, self.kept = rotary, grid, device, kept
        self._axes = self._made(frames)
        self.of = lru_cache(kept)(self._of)
        self.still = lru_cache(kept)(self._still)

    def on(self, device: torch.device) -> "RotaryTables":
        """Makes the same for another device."""
        return RotaryTables(self.rotary, self.size, device, self._axes[0].shape[1], self.kept)

    def time(self, frames: int) -> Tensor:
        """Cosines and sines in time of at least so many frames, float32 [2, frames, pairs]."""
        made = self._axes[0].shape[1]
        if frames > made:
            self._axes = self._made(max(frames, 2 * made))
        return self._axes[0]

    def _made(self, frames: int) -> list[Tensor]:
        return [axis.to(self.device) for axis in self.rotary.axes(torch.arange(frames), *self.size)]

    def _still(self, frames: int) -> Tensor:
        """The table of frames that all stand at 0."""
        time, *sides = self._axes
        return self._put_together([time[:, :1].expand(-1, frames, -1), *sides])

    def _of(self, first: int, frames: int) -> Tensor:
        """The table of consecutive frames' tokens, in the form that the rotary's product takes."""
        time = self.time(first + frames)
        return self._put_together([time[:, first : first + frames], *self._axes[1:]])

    def at(self, frames: Sequence[int]) -> Tensor:
        """The table of any frames' tokens."""
        time = self.time(max(frames) + 1)
        return self._put_together([time[:, list(frames)], *self._axes[1:]])

    def _put_together(self, axes: list[Tensor]) -> Tensor:
        return self.rotary.product.table(self.rotary.grid(axes))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the pairs of x [..., tokens, D] by a table [2, ..., tokens, D / 2]; computed in float32, x's dtype out.

    On a processor that is a product of complex numbers, in one pass instead of seven: of whole vectors of them, for
    what is left over would be rounded in another way, and a token's bits depend on how many there are. What compiles
    has no such type.
    """
    cosine, sine = table
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and pairs.shape[-2] % VECTOR == 0 and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.complex(cosine, sine)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).to(x.dtype)


IN_TORCH = RotaryProduct(lambda table: table, rotate)


class Positions:
    """Rotary tables of one run.

    Where positions are relative, keys are stored without their turn in time and get it when they are read, so that no
    rounding adds up over a long run, and kept frames are numbered one after another (`kept_places`).

    Args:
        plan: of the run's memory.
        rotary: of the network.
        device: where tables are used.
    """

    def __init__(self, plan: MemoryPlan, rotary: Rotary, device: torch.device):
        self.plan, self.device = plan, device
        self.relative = plan.relative
        self.time_dims = rotary.parts[0]
        self.shift = 0  # frames by which positions are moved towards zero
        self.rotate = rotary.product.turn
        seen = self.window + plan.lead + plan.end if self.relative else self._whole
        self._tables = RotaryTables(rotary, plan.grid, device, seen, plan.tables)
        self._on_cpu = partial(RotaryTables, rotary, plan.grid, torch.device("cpu"))

    @property
    def window(self) -> int:
        """Frames that relative positions run over, a lead not counted."""
        plan = self.plan
        return min(plan.total_chunks * plan.chunk_frames, plan.clean_frames + plan.max_active * plan.chunk_frames)

    def reach(self, frames: int) -> None:
        """Moves the window, so that a video of so many frames ends inside it."""
        if self.relative:
            self.shift = max(self.shift, frames - self.plan.lead - self.window)

    def sees_end(self, chunk: int | Given) -> bool:
        """Whether a chunk looks at a given end; where positions are relative, only from within a window's length."""
        return not self.relative or self.plan.first_frame(Given.END) - self.plan.first_frame(chunk) <= self.window

    def table(self, chunk: int | Given) -> Tensor:
        """The rotary table of a chunk's tokens, [2, tokens, D / 2]."""
        if isinstance(chunk, Rerun) and not self.relative:
            return self._tables.at(chunk.frames)
        if isinstance(chunk, Rerun):  # numbered one after another, up to the frame that follows them
            count = len(chunk.frames)
            return self._tables.of(chunk.frames[-1] + 1 - count - self.shift, count)
        moved = self.shift + (self._beyond() if chunk is Given.END else 0)
        return self._tables.of(self.plan.first_frame(chunk) - moved, self.plan.frames_of(chunk))

    def absolute_table(self, chunk: int | Given) -> Tensor:
        """The same, counted from the start of the video."""
        return self._tables.of(self.plan.first_frame(chunk), self.plan.frames_of(chunk))

    def still_table(self, chunk: int | Given) -> Tensor:
        """The same without a turn in time."""
        return self._tables.still(self.plan.frames_of(chunk))

    def turn(self, keys: Tensor, tokens: Tensor, end: int, front: int = 0) -> Tensor:
        """Turns stored keys in time, to where they stand in the window.

        Args:
            keys: [B, heads, N, D], turned in space alone.
            tokens: [B, heads, N] their numbers in the video, in time order.
            end: the frame of the video that follows them.
            front: so many at the beginning are of a given end.
        """
        places = self.kept_places(tokens[:, :, front:], end)
        if front:
            far = self.shift + self._beyond()
            places = torch.cat([(self.frames(tokens[:, :, :front]) - far).clamp(min=0), places], dim=2)
        return self._turned(keys, places, self._tables.time(1))

    def kept_places(self, tokens: Tensor, end: int) -> Tensor:
        """Numbers kept frames one after another, whatever was dropped between them: the newest stands right before the
        frame that follows, and each head numbers its own. A head that keeps single tokens may have some of more
        frames than the window has places for; then the oldest of them stand at 0.

        Source: flashdreams 0.1.0, KVCacheRelativeRotaryPositionEmbedding3D, for a sink and the newest frames.

        Args:
            tokens: [B, heads, N] numbers in the video, in time order.
            end: the frame of the video that follows them.

        Returns:
            int32 [B, heads, N].
        """
        frames = self.frames(tokens)
        begins = frames.diff(dim=2, prepend=frames[:, :, :1]) != 0
        number = begins.cumsum(dim=2, dtype=torch.int32)
        return (number - number[:, :, -1:] + (end - self.shift - 1)).clamp(min=0)

    def turn_absolute(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """Turns stored keys in time, to where they stand in the video."""
        return self._turned(keys, self.frames(tokens), self._absolute(keys))

    def turn_back(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """Takes the turn in time from keys that stand where they do in the video."""
        return self._turned(keys, self.frames(tokens), self._absolute(keys), back=True)

    def frames(self, tokens: Tensor) -> Tensor:
        """Frames that tokens belong to."""
        return tokens // self.plan.frame_tokens

    def _beyond(self) -> int:
        """Frames by which a given end is drawn nearer, so that it stands right behind the window at the farthest."""
        if not self.relative:
            return 0
        return max(0, self.plan.first_frame(Given.END) - self.shift - self.window - self.plan.lead)

    @property
    def _whole(self) -> int:
        """Frames of the whole video."""
        return self.plan.first_frame(Given.END) + self.plan.end

    def _absolute(self, keys: Tensor) -> Tensor:
        """Cosines and sines in time of the whole video where keys are: on the device, or on the CPU, to be stored."""
        return (self._tables if keys.device == self.device else self._on_cpu()).time(self._whole)

    def _turned(self, keys: Tensor, frames: Tensor, time: Tensor, back: bool = False) -> Tensor:
        """Turns keys [B, heads, N, D] in time by frames [B, heads, N]."""
        cosine, sine = time[:, frames]
        turned = keys.clone()
        table = torch.stack([cosine, -sine if back else sine])
        turned[..., : self.time_dims] = rotate(keys[..., : self.time_dims], table)
        return turned
