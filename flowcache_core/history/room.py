"""How much memory there is at all: a run that needs more is refused before anything is allocated."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import UserError

CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may take, in bytes, or "max"


def check_room(needed: int, device: torch.device) -> None:
    """Raises UserError where a run needs more bytes than the device and the system have together, in use or not."""
    room = system_memory()
    if room is None or device.type == "meta":  # tensors without data take nothing
        return
    if device.type == "cuda":
        room += torch.cuda.mem_get_info(device)[1]
    if needed > room:
        raise UserError(
            f"The run takes {needed / 2**30:,.1f} GiB beside the model, and this machine has {room / 2**30:,.1f} GiB "
            f"of memory in all; set a history budget, a smaller size, fewer frames a chunk or fewer chunks."
        )


def system_memory() -> int | None:
    """Gives the bytes that this process may take at most; None where the system does not say (Windows)."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    with suppress(OSError, ValueError):
        return min(found, int(CGROUP.read_text()))
    return found
