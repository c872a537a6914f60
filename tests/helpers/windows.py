"""A pretended Windows, for what Linux does otherwise: no file that is open or mapped is replaced or removed; no links,
no fork, no handles of folders; paths with drive letters and back-slashes."""

import errno
import multiprocessing
import ntpath
import os
import shutil
from pathlib import Path, PureWindowsPath


def is_held(path: str | os.PathLike) -> bool:
    """Whether this process has a file open or mapped."""
    real = os.path.realpath(path)
    if any(line.rstrip("\n").endswith(f" {real}") for line in Path("/proc/self/maps").read_text().splitlines()):
        return True
    return any(_target(opened) == real for opened in Path("/proc/self/fd").iterdir())


def _target(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # closed since
        return None


def pretend_windows(monkeypatch, held_by_others: tuple[Path, ...] = ()) -> None:
    """Has the system's calls refuse what they refuse on Windows.

    Args:
        held_by_others: files that another program, such as a player, has open.
    """
    open_file = os.open

    def refuse_held(work):
        def call(*paths, **more):
            for path in paths:
                if os.path.isfile(path) and (is_held(path) or Path(path) in held_by_others):
                    raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
            return work(*paths, **more)

        return call

    def no_links(*args, **more):
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    def no_folders(path, flags, *args, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, *args, **more)

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, refuse_held(getattr(os, name)))
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, no_links)
    monkeypatch.setattr(os, "open", no_folders)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # how it tells Windows, where folders have no handles
    for name in ("fork", "sysconf", "mkfifo"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])


class DrivePath(PureWindowsPath):
    """A path of Windows, such as C:\\ComfyUI\\output, that stands for one of this system."""

    @property
    def here(self) -> Path:
        return Path(str(self).removeprefix("C:").replace("\\", "/"))

    def resolve(self) -> "DrivePath":
        return DrivePath(ntpath.normpath(str(self)))

    def glob(self, pattern: str) -> list["DrivePath"]:
        return [DrivePath(f"C:{found}") for found in self.here.glob(pattern)]

    def is_dir(self) -> bool:
        return self.here.is_dir()
