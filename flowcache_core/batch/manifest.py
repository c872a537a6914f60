"""What became of every job: one line for each, added to a file as they end. The newest line of a job counts."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Literal

from ..errors import UserError
from .jobs import Done

NAME = "manifest.jsonl"
Status = Literal["done", "failed"]


class Manifest:
    """The file in a folder of results.

    Args:
        folder: is made where it is missing.
        lines: of the file of jobs.

    Attributes:
        done: jobs that need not be run again.
    """

    def __init__(self, folder: Path, lines: int):
        self.path = folder / NAME
        self.done = Done(lines)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in self._entries():
                if entry.get("status") == "done":
                    self.done.add(int(entry["line"]), str(entry["job"]))
            self._file: IO[str] = self.path.open("a", encoding="utf-8")
            if self._file.tell() and not self._ends_whole():
                self._file.write("\n")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"Cannot use {self.path} ({error}); choose another --out.") from error

    def add(self, number: int, digest: str, status: Status, **more: object) -> None:
        """Writes what became of a job."""
        entry: Mapping[str, object] = {"line": number, "job": digest, "status": status, **more}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()
        if status == "done":
            self.done.add(number, digest)

    def close(self) -> None:
        """Has all of it on the disk itself."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _entries(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:  # cut short by a crash
                    continue
                if isinstance(entry, dict):
                    yield entry

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
