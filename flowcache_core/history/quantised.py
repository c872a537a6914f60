"""Keys and values in 8 or 4 bits: a token's numbers as small integers with a scale of their own.

A token's head has one scale (8 bits), or one for every `GROUP` numbers (4 bits): keys differ from channel to channel,
and a few large ones would leave nothing of the others in 4 bits. Scales are rounded up to few binary digits, so that
integer times scale fits bfloat16's eight: what has been widened is packed again to the same bytes, and states, cuts and
runs that go on have the same bits.

Source of the idea: KIVI (arXiv 2402.02750), whose keys share scales along the tokens; those would change as tokens go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings import HistoryType
from .offload import OffloadableBuffer
from .streams import SideStream

GROUP = 32  # numbers that share a scale in 4 bits
SMALLEST = 2.0**-100  # of scales, for tokens that are all 0


@dataclass(frozen=True)
class Packing:
    """How the numbers of a token's head are packed.

    Attributes:
        bits: of an integer, 8 or 4.
        width: numbers of a head.
    """

    bits: int
    width: int

    @property
    def group(self) -> int:
        """Numbers that share a scale."""
        return self.width if self.bits == 8 or self.width % GROUP else GROUP

    @property
    def bytes(self) -> int:
        """Of a token's head: the integers, then the scales in bfloat16."""
        return self.width * self.bits // 8 + 2 * (self.width // self.group)

    def pack(self, x: Tensor) -> Tensor:
        """Packs numbers [..., width], which must be finite, to int8 [..., bytes]."""
        groups = x.float().unflatten(-1, (-1, self.group))
        largest = 2 ** (self.bits - 1) - 1
        digits = 8 - (self.bits - 1)  # that a scale may have beside an integer in bfloat16
        scales = _rounded_up(groups.abs().amax(dim=-1, keepdim=True) / largest, digits).clamp(min=SMALLEST)
        codes = (groups / scales).round().to(torch.int8).flatten(-2)
        if self.bits == 4:
            low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
            codes = (high << 4) | (low & 15)
        return torch.cat([codes, scales[..., 0].bfloat16().view(torch.int8)], dim=-1)

    def unpack(self, packed: Tensor, out: Tensor) -> Tensor:
        """Widens what `pack` gave into numbers [..., width]."""
        count = self.width * self.bits // 8
        codes, scales = packed[..., :count], packed[..., count:].contiguous().view(torch.bfloat16)
        if self.bits == 4:
            codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=-1).flatten(-2)
        wide = torch.mul(codes.unflatten(-1, (-1, self.group)), scales[..., None])
        return out.copy_(wide.flatten(-2))


def packing_of(kind: HistoryType, width: int) -> Packing | None:
    """The packing of heads of so many numbers; None where they stay as they are."""
    return None if kind == "as computed" else Packing(int(kind.removeprefix("int")), width)


def _rounded_up(x: Tensor, digits: int) -> Tensor:
    """Rounds positive float32 numbers up to so many binary digits."""
    dropped = (1 << (24 - digits)) - 1
    return ((x.view(torch.int32) + dropped) & ~dropped).view(torch.float32)


class PackedBuffer(OffloadableBuffer):
    """A buffer of packed numbers that is read and written as if they were not.

    Attributes:
        packing: of its numbers.
        dtype: of what is read.
    """

    packing: Packing
    dtype: torch.dtype

    @classmethod
    def room_for(
        cls,
        size: tuple[int, ...],
        moved: Sequence[int],
        packing: Packing,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream,
    ) -> "PackedBuffer":
        """Room for size[2] tokens, the first ones in system memory, in pieces of `moved` tokens."""
        buffer = cls.empty((*size[:-1], packing.bytes), moved, torch.int8, device, side)
        assert isinstance(buffer, PackedBuffer)
        buffer.packing, buffer.dtype = packing, dtype
        return buffer

    def read(self, first: int, last: int) -> Tensor:
        """Reads tokens first to last, widened, on the device."""
        packed = super().read(first, last)
        return self.packing.unpack(packed, packed.new_empty(*packed.shape[:-1], self.packing.width, dtype=self.dtype))

    def copy_to(self, target: Tensor, first: int, waits: bool = True) -> None:
        """Copies the tokens from `first` on, widened, as many as the target has."""
        last = first + target.shape[2]
        if target.device == self.device:
            self.packing.unpack(super().read(first, last), target)
        else:
            target.copy_(self.read(first, last), non_blocking=not waits)

    def changes(self, first: int, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Lists what `write` does: each part that changes and what comes there, packed, already beside it."""
        return super().changes(first, self.packing.pack(values))
