"""What ComfyUI-GGUF leaves of a GGUF file: it hands the host's loader every tensor, and the host drops those that its
own network does not know. They are read with the `gguf` package, which ComfyUI-GGUF brings along.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

ENDING = ".gguf"
PREFIX = "model.diffusion_model."  # that some converters leave before every name


def read_gguf(path: Path, starts: tuple[str, ...]) -> dict[str, Tensor]:
    """Reads those tensors of a GGUF file whose names begin so, without a prefix, as float32; the others stay on disk.

    Raises:
        UserError: no `gguf` package, or no GGUF file.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise UserError(
            f"{path.name}: the package gguf is not installed; ComfyUI-GGUF's requirements bring it."
        ) from None
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OSError) as error:  # its reader checks little
        raise UserError(f"{path.name} is not a whole GGUF file: {error}") from error
    found = {}
    for tensor in tensors:
        name = tensor.name.removeprefix(PREFIX)
        if name.startswith(starts):
            values = dequantize(tensor.data, tensor.tensor_type)
            shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF writes the last dimension first
            found[name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
    return found
