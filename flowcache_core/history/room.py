"""How much memory there is: a run that needs more than the machine has is refused before anything is allocated, and one
that needs more than the device has free begins with a part of its history in system memory.

A driver may spill what does not fit without a word (Windows' does), at a fraction of the speed; so it is not left to
errors alone.
"""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from .plan import MemoryPlan

RESERVE = 256 * 2**20  # bytes of the device that a plan does not know of: work space of its libraries, gaps
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


def placed(plan: MemoryPlan, device: torch.device, beside: int = 0) -> MemoryPlan:
    """Gives the plan with as many chunks of history in system memory, oldest first, as the device has no room for.

    Args:
        beside: bytes that the run's caller will hold as well.

    Raises:
        UserError: device and system have less together.
    """
    check_room(plan.bytes + beside, device)
    free = free_memory(device)
    if free is None or plan.away:
        return plan
    return replace(plan, moved=chunks_to_move(plan, free - RESERVE))


def chunks_to_move(plan: MemoryPlan, room: int) -> int:
    """Counts the chunks of each branch's history that must leave the device for a run to take no more than `room`
    bytes there; all that can, where that is not enough."""
    if plan.device_bytes <= room:
        return 0
    counts = range(1, plan.movable_chunks + 1)
    return next((count for count in counts if replace(plan, moved=count).device_bytes <= room), plan.movable_chunks)


def free_memory(device: torch.device) -> int | None:
    """Gives a device's free bytes, those that torch holds unused included; None where it cannot tell."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def system_memory() -> int | None:
    """Gives the bytes that this process may take at most; None where the system does not say (Windows)."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    with suppress(OSError, ValueError):
        return min(found, int(CGROUP.read_text()))
    return found
