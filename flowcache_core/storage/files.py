"""Files that appear whole or not at all, and what is checked before a file is believed."""

import json
import os
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError, first_line

LARGEST_JSON = 2**26  # bytes of a file
LARGEST_HEADER = 2**25  # bytes of a safetensors header: 65,536 tensors take some 10 MB


DIRECTIONS = dict.fromkeys([0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def clean_name(prefix: str, fallback: str) -> str:
    """Gives a file name prefix as a folder shows it: without marks that turn its direction, `_` for control characters
    (newlines), no spaces around the name, and `fallback` where it names no file.

    Args:
        prefix: with `/` between folders.
    """
    shown = "".join("_" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in prefix.translate(DIRECTIONS))
    *folders, name = shown.split("/")
    return "/".join([*folders, fallback if name.strip() in ("", ".") else name.strip()])


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


def check_header(path: Path | str, follow: bool = True) -> None:
    """Raises OSError where `path` is no regular file, or its safetensors header is longer than any that is written."""
    check_regular(path, follow)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise OSError(f"a header of {length:,} bytes, expected at most {LARGEST_HEADER:,}")


def read_json_text(path: Path) -> str:
    """Reads the text of a JSON file.

    Raises:
        ValueError: no regular file, no text, or too large.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise ValueError(error) from error
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {LARGEST_JSON:,}")
    return path.read_text()


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

    The folder is made where it is missing. When this returns, the file survives a power cut.

    Raises:
        UserError: the folder or file cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        _make_folder(path.parent)
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file.")
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            write(partial)
            _sync(partial)
            os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = first_line(error) if isinstance(error, SafetensorError) else error.strerror or type(error).__name__
        todo = "free some space or choose a folder that you can write to"
        if isinstance(error, PermissionError) and path.exists():  # Windows replaces no file that is open
            todo = "close what has it open, or choose another name"
        raise UserError(f"Cannot write {path} ({reason}); {todo}.") from error
    return path


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync(path: Path) -> None:
    """Waits until what was written is on the disk itself."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The same for the names in a folder, where the system can (Windows cannot)."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def parse_json(text: str | bytes):
    """Reads what a JSON text says.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
