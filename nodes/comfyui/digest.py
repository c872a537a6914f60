"""What tells one run from another: a digest of everything that determines it, functions and objects of nodes too."""

import hashlib
from collections.abc import Iterable, Mapping, Set
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor

from ...flowcache_core.errors import UserError

LARGE = 2**22  # elements; of larger tensors so many are looked at
PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...), slice, torch.dtype, torch.device, PurePath)


def digest(*what) -> str:
    """32 hexadecimal digits.

    A function is its code and all that it holds on to, another object its class and all that it holds.

    Raises:
        UserError: something cannot be looked into, so that this run may be another one tomorrow and seem the same.
    """
    try:
        return Digest().of(what).hex()[:32]
    except RecursionError as error:
        raise UserError(
            "The run holds objects nested too deeply to tell it from others; disconnect 'resume'."
        ) from error


class Digest:
    """Of one run; each object is looked into once."""

    def __init__(self):
        self._known: dict[int, tuple[object, bytes]] = {}  # by id, which is an object's own while that is held

    def of(self, part) -> bytes:
        if isinstance(part, PLAIN) and not isinstance(part, Enum):
            return hashlib.sha256(repr((type(part).__name__, part)).encode()).digest()
        if id(part) not in self._known:
            self._known[id(part)] = part, f"again {len(self._known)}".encode()  # should it lead back to itself
            found = hashlib.sha256(type(part).__name__.encode())
            for inside in self._parts(part):
                found.update(inside if isinstance(inside, bytes) else self.of(inside))
            self._known[id(part)] = part, found.digest()
        return self._known[id(part)][1]

    def _parts(self, part) -> Iterable:
        if isinstance(part, Tensor):
            return _numbers(part)
        if isinstance(part, (np.ndarray, np.generic)):
            return [part.shape, part.dtype.str, part.tobytes()]
        if isinstance(part, Mapping):
            return sorted(self.of(name) + self.of(value) for name, value in part.items())
        if isinstance(part, Set):
            return sorted(map(self.of, part))
        if isinstance(part, (list, tuple)):
            return [len(part), *part]
        if isinstance(part, Enum):
            return [part.name]
        if isinstance(part, (type, ModuleType, BuiltinFunctionType)):
            return _names(part)
        if isinstance(part, FunctionType):
            held = [_held(cell) for cell in part.__closure__ or ()]
            return [*_names(part), part.__code__, part.__defaults__, part.__kwdefaults__, held, vars(part)]
        if isinstance(part, CodeType):
            return [part.co_code, part.co_consts, part.co_names]
        if isinstance(part, MethodType):
            return [part.__func__, part.__self__]
        if isinstance(part, partial):
            return [part.func, part.args, part.keywords]
        if hasattr(part, "__dict__"):
            return [*map(_names, type(part).__mro__), vars(part)]
        kind = type(part)
        raise UserError(
            f"A node has put a {kind.__module__}.{kind.__qualname__} on the model or into a prompt, so the run cannot "
            f"be told from others to resume it; take that node out, or disconnect 'resume'."
        )


def _names(part) -> list[str]:
    return [getattr(part, name, "") for name in ("__module__", "__qualname__", "__name__")]


def _numbers(tensor: Tensor) -> list:
    flat = tensor.detach().flatten()
    if tensor.is_meta:
        flat = flat.new_empty(0, device="cpu")
    flat = flat[:: max(1, flat.numel() // LARGE)].contiguous().cpu()
    return [tuple(tensor.shape), tensor.dtype, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""]


def _held(cell) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
