"""Files that appear whole or not at all, and what is checked before a file is believed."""

import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError


def check_writable(path: Path | str) -> None:
    """Raises UserError where `path` could not be written later on; changes nothing on the disk."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"Cannot write {path}: {folder} is no folder that may be written to; choose another one.")


def check_regular(path: Path | str, follow: bool = True) -> None:
    """Raises OSError where `path` is no regular file: a pipe or a device may never end.

    Args:
        follow: links to regular files count as such.
    """
    if not stat.S_ISREG(os.stat(path, follow_symlinks=follow).st_mode):
        raise OSError(f"{Path(path).name} is no regular file")


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Gives the CRC-32 of contiguous tensors on the CPU, by which a flipped or swapped one is found."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        if tensors[name].numel():
            found = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def write_whole(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Calls `write` with a temporary path beside the given one, and renames what it wrote once it is whole.

    The folder is made where it is missing.

    Raises:
        UserError: the folder or file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file.")
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            write(partial)
            os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"Cannot write {path} ({reason}); choose a folder that you can write to.") from error
    return path


def parse_json(text: str | bytes):
    """Reads what a JSON text says.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
