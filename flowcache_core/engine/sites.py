"""What a run keeps on each device: branches of guidance may be divided among several, which have a network each."""

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

Site = TypeVar("Site")


class Sites(Generic[Site]):
    """One site for each backbone, made at the first call for it; calls may come from several threads.

    Args:
        backbone, device: of the run.
        make: makes a site for a backbone on a device.
    """

    def __init__(self, backbone: Any, device: torch.device, make: Callable[[Any, torch.device], Site]):
        self._make, self._lock = make, Lock()
        self.home = make(backbone, device)
        self._made = {id(backbone): (backbone, self.home)}

    def of(self, backbone: Any | None, device: torch.device) -> Site:
        """Gives a backbone's site; None is the run's own."""
        if backbone is None:
            return self.home
        with self._lock:
            if id(backbone) not in self._made:
                self._made[id(backbone)] = backbone, self._make(backbone, device)
            return self._made[id(backbone)][1]

    def __iter__(self) -> Iterator[Site]:
        return (site for _, site in list(self._made.values()))
