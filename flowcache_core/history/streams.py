"""A CUDA stream for work that may go on beside the network: copies, decoding. One switch, `Settings.overlap`.

On other devices, and switched off, the same work is done at once, in order.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """What a side stream is making; not to be looked at before it is waited for."""

    _result: Result
    _made: Any = None  # the event after it, where it is made on a stream of its own
    _device: torch.device | None = None

    @property
    def there(self) -> bool:
        """Whether the CPU need not wait for it any more."""
        return self._made is None or self._made.query()

    def on_cpu(self) -> Result:
        """The result, for the CPU: waits until it is there."""
        if self._made is not None:
            self._made.synchronize()
        return self._result

    def on_device(self) -> Result:
        """The result, for work on the current stream, which waits for it; the CPU does not."""
        if self._made is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._made)
            _record(tree_leaves(self._result), current)
        return self._result


class SideStream:
    """Does work beside the current stream of a device.

    Args:
        device: that computes.
        on: the switch.
    """

    def __init__(self, device: torch.device, on: bool = True):
        self._device = device
        self._stream = torch.cuda.Stream(device) if on and _has_streams(device) else None
        self._later: list[Callable[[], object]] = []

    @property
    def overlaps(self) -> bool:
        return self._stream is not None

    def run(self, work: Callable[[], Result], inputs: Iterable[Tensor]) -> Pending[Result]:
        """Does work on the device after what the current stream has been given so far.

        Args:
            inputs: tensors of the current stream that the work reads or writes; their memory is not given to others
                before it is done.
        """
        if self._stream is None:
            return Pending(work())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            result = work()
        _record(inputs, self._stream)
        return Pending(result, self._stream.record_event(), self._device)

    def to_cpu(self, tensor: Tensor) -> Pending[Tensor]:
        """A tensor on the CPU, copied if it is not there."""

        def copy() -> Tensor:
            return self.cpu_like(tensor, tensor.shape).copy_(tensor, non_blocking=True)

        return self.run(copy, [tensor]) if self.overlaps else Pending(tensor.cpu())

    def cpu_like(self, tensor: Tensor, shape: Iterable[int]) -> Tensor:
        """An empty tensor of that shape on the CPU, where the device can copy to and from it beside other work."""
        size = tuple(shape)
        if self.overlaps:
            try:
                return torch.empty(size, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError:  # so much memory cannot be pinned: copies wait for one another
                pass
        return torch.empty(size, dtype=tensor.dtype)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is begun inside goes to this stream in place of the current one, and nobody waits for it.

        It does not wait for the current stream: what it begins with must be on the CPU, and what it makes must be asked
        for with `to_cpu`.
        """
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def later(self, work: Callable[[], object]) -> None:
        """Work for the CPU, which waits for results: done at the next `settle`, when the device has got more to do;
        at once where nothing overlaps."""
        self._later.append(work)
        if not self.overlaps:
            self.settle()

    def settle(self) -> None:
        """Does what was left for later, oldest first."""
        while self._later:
            self._later.pop(0)()


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def _record(tensors: Iterable[object], stream) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(stream)


AT_ONCE = SideStream(torch.device("cpu"))
