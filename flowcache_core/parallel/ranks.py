"""A group of processes that exchange tensors, and the bytes that this one sends: exact copies, parts of any size.

Everything travels as bytes, for not every engine takes every type (gloo knows no float8), and contiguous, for gloo
ignores the strides of a slice.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..history.offload import is_out_of_memory


def shares(count: int, parts: int) -> list[range]:
    """Divides so many things among so many, in order; the first ones get one more where it does not come out even."""
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class Ranks:
    """Processes of one group.

    Args:
        members: their numbers in the whole run, in order; this process is one of them. All processes of the run make
            all groups, in the same order.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        sent: bytes that this process has sent to others of the group.
    """

    def __init__(self, members: Sequence[int], group: dist.ProcessGroup | None = None):
        self.members, self.group = list(members), group
        self.rank, self.size = self.members.index(dist.get_rank()), len(members)
        self.sent = 0

    @classmethod
    def everyone(cls) -> "Ranks":
        """All processes of the run."""
        return cls(range(dist.get_world_size()))

    @classmethod
    def divided(cls, groups: Sequence[Sequence[int]]) -> "Ranks":
        """The one of several groups that this process is in."""
        made = [dist.new_group(list(members)) for members in groups]
        return next(
            cls(members, group) for members, group in zip(groups, made, strict=True) if dist.get_rank() in members
        )

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Gives each member a part of this process's, and gets one of each.

        Args:
            parts: one for each member, of one type; any may be empty.
            shapes: of what comes from each member.
        """
        like = parts[0]
        packed = torch.cat([part.reshape(-1) for part in parts])
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = packed.new_empty(sum(counts))
        size, lengths = like.element_size(), [part.numel() for part in parts]
        dist.all_to_all_single(
            received.view(torch.uint8), packed.view(torch.uint8),
            [size * count for count in counts], [size * length for length in lengths], group=self.group,
        )  # fmt: skip
        self.sent += size * (sum(lengths) - lengths[self.rank])
        return [part.view(*shape) for part, shape in zip(received.split(counts), shapes, strict=True)]

    def gather(self, part: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Gives every member this process's part, and gets theirs, of the given shapes."""
        return self.exchange([part.contiguous()] * self.size, shapes)

    def send(self, tensor: Tensor, to: int) -> Callable[[], None]:
        """Begins to send to a member; what it gives waits until the tensor may be let go of."""
        kept = tensor.contiguous()
        work = dist.isend(_bytes(kept), self.members[to], group=self.group)
        self.sent += kept.nbytes

        def wait() -> None:
            if work is not None:
                work.wait()

        return wait

    def receive(self, into: Tensor, source: int) -> None:
        """Waits for what a member sends, of `into`'s size, which is contiguous."""
        dist.recv(_bytes(into), self.members[source], group=self.group)

    def spread(self, tensor: Tensor, source: int) -> Tensor:
        """Gives every member what one of them has; all hold a contiguous tensor of that shape."""
        dist.broadcast(_bytes(tensor), self.members[source], group=self.group)
        if self.rank == source:
            self.sent += (self.size - 1) * tensor.nbytes
        return tensor

    def objects(self, thing: object) -> list:
        """Gets a small thing of every member."""
        found: list = [None] * self.size
        dist.all_gather_object(found, thing, group=self.group)
        return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class Replay:
    """Exchanges inside a piece of work that one process may have to begin anew, for want of memory, where the others do
    not: each is made once, and the work begun anew gets what came of it.

    So a process that runs out of memory is late, and no other needs to know.
    """

    def __init__(self):
        self._done: list[Tensor | list[Tensor] | None] = []
        self._at = 0

    def __enter__(self) -> "Replay":
        self._at = 0
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not is_out_of_memory(error):
            self._done.clear()

    def once(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Does work that ends with its exchange, unless it was done. What came of earlier ones is let go of."""
        if self._at == len(self._done):
            result = work()
            self._done = [*[None] * self._at, result]
        found = self._done[self._at]
        self._at += 1
        assert isinstance(found, list)
        return found

    def skip(self) -> None:
        """Passes over the next exchange, where `ahead` says that it is not needed."""
        self._at += 1

    @property
    def ahead(self) -> bool:
        """Whether the exchange after the next one was made already, so that the next one's result is not needed."""
        return len(self._done) > self._at + 1
