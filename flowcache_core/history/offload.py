"""The history's way to system memory, for a device that runs out of its own: the oldest chunk first, one at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .streams import AT_ONCE, Pending, SideStream

SYSTEM = torch.device("cpu")  # its memory is the system's
TOO_LITTLE = "too little device memory"  # a line of the report begins so
ALLOCATION_FAILED = 2  # CUDA's number for it, on errors of the driver
SAYINGS = (
    "out of memory",
    "not enough gpu video memory",
)  # of devices that raise nothing but RuntimeError (DirectML's)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Says whether an error means that a device's memory ran out, whichever kind of error its driver raises."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    failed = getattr(error, "error_code", None) == ALLOCATION_FAILED
    return failed or any(saying in str(error).lower() for saying in SAYINGS)


def forget_error(error: BaseException | None) -> None:
    """Takes back an error that the driver would report once more, at the next call that waits for the device."""
    if not isinstance(error, torch.cuda.OutOfMemoryError) and torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.synchronize()


@dataclass
class OffloadableBuffer:
    """One layer's keys or values [B, heads, tokens, D], or what else there is one of a token [B, heads, tokens].

    Attributes:
        here: on the device that computes; the tokens after those that have moved.
        moved: in system memory, oldest first.
        side: brings them back.
    """

    here: Tensor
    moved: list[Tensor] = field(default_factory=list)
    side: SideStream = AT_ONCE

    def __post_init__(self):
        self.device = self.here.device
        # Moved pieces, from the first on, that are on the device as well or on their way to it.
        self._ahead: Pending[list[Tensor]] = Pending([])
        self._ahead_tokens = 0

    @classmethod
    def empty(
        cls, size: tuple[int, ...], moved: Sequence[int], dtype: torch.dtype, device: torch.device, side: SideStream
    ) -> "OffloadableBuffer":
        """Room for size[2] tokens, the first ones in system memory, in pieces of `moved` tokens."""
        batch, heads, tokens, *rest = size
        here = torch.empty(batch, heads, tokens - sum(moved), *rest, dtype=dtype, device=device)
        return cls(here, [side.cpu_like(here, (batch, heads, count, *rest)) for count in moved], side)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in (*self.moved, self.here))

    @property
    def tokens_moved(self) -> int:
        return sum(piece.shape[2] for piece in self.moved)

    def read(self, first: int, last: int) -> Tensor:
        """Reads tokens first to last, on the device; no copy where they lie there in one piece."""
        parts = self._parts(first, last, ahead=True)
        if len(parts) == 1:
            return parts[0].to(self.device)
        whole = self.here.new_empty(*parts[0].shape[:2], last - first, *self.here.shape[3:])
        _fill(whole, parts)
        return whole

    def copy_to(self, target: Tensor, first: int, waits: bool = True) -> None:
        """Copies the tokens from `first` on, as many as the target has; the CPU waits for it or goes on."""
        ahead = target.device == self.device
        _fill(target, self._parts(first, first + target.shape[2], ahead), waits)

    def write(self, first: int, values: Tensor) -> None:
        """Overwrites tokens from `first` on."""
        for part, new in self.changes(first, values):
            part.copy_(new)

    def changes(self, first: int, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Lists what `write` does: each part that changes and what comes there, already beside it."""
        parts = self._parts(first, first + values.shape[2])
        if first < self._ahead_tokens:
            self.forget()
        news = values.split([part.shape[2] for part in parts], dim=2)
        return [(part, new.to(part.device)) for part, new in zip(parts, news, strict=True)]

    def move(self, count: int) -> None:
        """Moves the oldest `count` tokens that are here to system memory.

        Takes no memory of the device: all tokens leave it, as one copy without a temporary one; then those that stay
        come back. Should they find no room, for others use the device too, they stay in system memory.
        """
        self.forget()
        if not self.here.shape[2]:
            return
        everything = self.here.to(SYSTEM)
        self.here = everything[:, :, :0].to(self.device, copy=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or the rest would take a part of the old buffer and leave a gap in it
        self.moved.append(self._on_cpu(everything[:, :, :count]))
        rest = everything[:, :, count:]
        if runs_out_of_memory(lambda: self._put_back(rest)):
            self.moved.append(self._on_cpu(rest))

    def _put_back(self, tokens: Tensor) -> None:
        self.here = tokens.to(self.device, copy=True)

    def _on_cpu(self, part: Tensor) -> Tensor:
        return self.side.cpu_like(part, part.shape).copy_(part)

    def fetch(self, tokens: int, before: "OffloadableBuffer") -> None:
        """Begins to bring what has moved back to the device, for the next time that it is read.

        Args:
            tokens: so many at the front will not change before that; only pieces inside them are fetched.
            before: of a layer that has been read: the room that its tokens took on the device is taken over. Reads of
                it that still wait come first, for the side stream waits for the current one.
        """
        starts = accumulate((piece.shape[2] for piece in self.moved), initial=0)
        pieces = [piece for piece, start in zip(self.moved, starts, strict=False) if start + piece.shape[2] <= tokens]
        if self._ahead_tokens or not pieces:
            return
        room = before._ahead.on_device()
        before.forget()
        if [part.shape for part in room] != [piece.shape for piece in pieces]:
            room = []
            if runs_out_of_memory(lambda: room.extend(torch.empty_like(each, device=self.device) for each in pieces)):
                return

        def bring() -> list[Tensor]:
            for part, piece in zip(room, pieces, strict=True):
                part.copy_(piece, non_blocking=True)
            return room

        self._ahead = self.side.run(bring, room)
        self._ahead_tokens = sum(piece.shape[2] for piece in pieces)

    def forget(self) -> None:
        """Lets go of what was brought back ahead, and of its room."""
        self._ahead, self._ahead_tokens = Pending([]), 0

    def _parts(self, first: int, last: int, ahead: bool = False) -> list[Tensor]:
        """Tokens first to last, where they lie, or also where they have been fetched; at least one part, if an empty
        one."""
        if not self.moved:
            return [self.here[:, :, first:last]]
        fetched = self._ahead.on_device() if ahead and first < self._ahead_tokens else []
        moved = [*fetched, *self.moved[len(fetched) :]]
        parts, start = [], 0
        for piece in (*moved, self.here):
            parts.append(piece[:, :, max(0, first - start) : max(0, last - start)])
            start += piece.shape[2]
        return [part for part in parts if part.shape[2]] or [self.here[:, :, :0]]


def _fill(target: Tensor, parts: list[Tensor], waits: bool = True) -> None:
    for piece, part in zip(target.split([part.shape[2] for part in parts], dim=2), parts, strict=True):
        piece.copy_(part, non_blocking=not waits)


class Movable(Protocol):
    """A history, as far as this file is concerned."""

    @property
    def on_device(self) -> bool: ...
    def move_chunk(self) -> None: ...


class Attempt:
    """Work that may be begun anew; where the device runs out of memory in it, it has failed and is begun again."""

    def __init__(self, histories: Collection[Movable]):
        self.histories, self.failed = histories, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        self.failed = is_out_of_memory(error) and any(history.on_device for history in self.histories)
        if self.failed:
            forget_error(error)
        return self.failed


def attempts(histories: Collection[Movable]) -> Iterator[Attempt]:
    """Tries a piece of work until the device has memory for it, with one more chunk of each history in system memory
    each time:

        for attempt in attempts(histories):
            with attempt:
                work()

    A forward is such work: it changes nothing until it is done, but its own slot of the history, which it fills again.

    Raises:
        RuntimeError: the device's own, where it ran out with nothing of the histories left on it.
    """
    while True:
        attempt = Attempt(histories)
        yield attempt
        if not attempt.failed:
            return
        for history in histories:  # here, where nothing holds the failed work's tensors any more
            history.move_chunk()


def runs_out_of_memory(work: Callable[[], object]) -> bool:
    """Does the work; says whether the device had no memory for it. Then nothing of it is left on the device."""
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        forget_error(error)
        return True
    return False
