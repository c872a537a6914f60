"""A name for what a run is made of: equal things have the same one, in another process too."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def digest_of(parts: Any) -> str:
    """32 hexadecimal digits that stand for numbers, words and tensors, alone or in lists and tuples."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            found.update(repr((part.shape, part.dtype)).encode())
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, (list, tuple)):
            found.update(b"[")
            for inside in part:
                add(inside)
        else:
            found.update(repr(part).encode())

    add(parts)
    return found.hexdigest()[:32]
