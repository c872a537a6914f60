"""A pretended device with streams, which does what it is given on the side as late as it may.

A copy on the side stream fills its target with rubbish and is done when somebody waits for it: what is read too early,
or changed too early, shows in the result.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

RUBBISH = 77


class Late(TorchDispatchMode):
    """Puts copies off."""

    def __init__(self, stream: "Stream"):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            read = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if any(target.untyped_storage()._cdata in read for target, _ in self.stream.waiting):
                self.stream.catch_up()  # a stream's own work stays in order
            return function(*args, **(kwargs or {}))
        target, source = args[:2]
        target.fill_(RUBBISH)
        self.stream.waiting.append((target, source))
        return target


@dataclass
class Device:
    """What was asked of the pretended device, in order."""

    told: list[str] = field(default_factory=list)
    streams: list["Stream"] = field(default_factory=list)

    def current_stream(self, device=None) -> "Current":
        return Current(self)

    @contextmanager
    def stream(self, stream: "Stream"):
        self.told.append("side begins")
        with Late(stream):
            yield


@dataclass
class Current:
    device: Device

    def wait_event(self, event: "Event") -> None:
        self.device.told.append("current waits")
        event.stream.catch_up()


@dataclass
class Stream:
    device: Device
    waiting: list = field(default_factory=list)

    def __post_init__(self):
        self.device.streams.append(self)

    def wait_stream(self, current: Current) -> None:
        self.device.told.append("side waits")

    def record_event(self) -> "Event":
        self.device.told.append("event")
        return Event(self)

    @torch.inference_mode()  # a device knows of no modes
    def catch_up(self) -> None:
        with _disable_current_modes():  # it may be waited for on the side stream itself
            while self.waiting:
                target, source = self.waiting.pop(0)
                target.copy_(source)

    def synchronize(self) -> None:
        self.device.told.append("host waits")
        self.catch_up()


@dataclass
class Event:
    stream: Stream

    def synchronize(self) -> None:
        self.stream.synchronize()

    def query(self) -> bool:
        """Whether it is done: what nobody waits for, never."""
        return not self.stream.waiting


def pretend_streams(streams: ModuleType, put: Callable[[object, str, object], None]) -> Device:
    """Gives the CPU streams.

    Args:
        streams: the module `history.streams`.
        put: sets an attribute, as pytest's monkeypatch does or for good.
    """
    made = Device()
    put(streams, "_has_streams", lambda device: True)
    put(streams, "_record", lambda tensors, stream: made.told.append(f"kept {len([*tensors])}"))
    put(torch.cuda, "Stream", lambda device: Stream(made))
    put(torch.cuda, "current_stream", made.current_stream)
    put(torch.cuda, "stream", made.stream)
    return made
