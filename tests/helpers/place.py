"""Where golden tests run: the processor, or the device that the script for a card names."""

import os

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.paths import GOLDEN_FOLDER

DEVICE = torch.device(os.environ.get("FLOWCACHE_TEST_DEVICE", "cpu"))


def golden(name: str) -> dict[str, Tensor]:
    """Loads a file of golden tensors to that device."""
    return load_file(GOLDEN_FOLDER / f"{name}.safetensors", device=str(DEVICE))
