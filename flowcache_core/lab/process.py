"""Memory of this process and facts about the machine. Linux; elsewhere the numbers are 0."""

import os
import platform
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def _status(key: str) -> int:
    if not STATUS.exists():
        return 0
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(key)), "")
    return int(line.split()[1]) * 1024 if line else 0


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return _status("VmRSS:")


def resident_peak() -> int:
    """The most that it ever held."""
    return _status("VmHWM:")


def machine() -> dict:
    """What was measured on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    }
