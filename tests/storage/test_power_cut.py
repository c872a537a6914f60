"""A power cut at any moment of a run: chunks that were kept are there, whatever of the unsynced writes is lost."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flowcache_core.storage import files
from tests.storage.test_run_folder import folder, one

Names = dict[Path, str]  # of files, each with the temporary name that it was written under


@dataclass
class Recorder:
    """What a run does to a disk: names and contents at every sync, and how many chunks it was told are kept.

    Attributes:
        now, safe: the names as the run sees them, and those that a synced folder has made safe.
        contents: of files that were synced.
        cuts: for a power cut after each event the files that are left, once with the names that are safe and once with
            all of them, and the chunks that must be there.
    """

    root: Path
    now: Names = field(default_factory=dict)
    safe: Names = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    cuts: list[tuple[dict[Path, bytes], int]] = field(default_factory=list)
    kept: int = 0

    def fsync(self, opened: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        if path.is_dir():
            self.safe = {name: file for name, file in self.safe.items() if name.parent != path}
            self.safe |= {name: file for name, file in self.now.items() if name.parent == path}
        else:
            self.contents[str(path)] = path.read_bytes()
        self.cut()

    def replaced(self, source, target) -> None:
        self.now[Path(target)] = str(source)
        self.cut()

    def unlinked(self, path) -> None:
        self.now.pop(Path(path), None)
        self.cut()

    def cut(self) -> None:
        for names in (self.safe, self.now):
            left = {name.relative_to(self.root): self.contents.get(file, b"") for name, file in names.items()}
            self.cuts.append((left, self.kept))


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Recorder:
    recorder, real_replace, real_unlink = Recorder(tmp_path / "runs"), os.replace, Path.unlink

    def replace(source, target):
        real_replace(source, target)
        recorder.replaced(source, target)

    def unlink(path, missing_ok=False):
        real_unlink(path, missing_ok=missing_ok)
        recorder.unlinked(path)

    monkeypatch.setattr(files.os, "fsync", recorder.fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    return recorder


def test_what_was_kept_is_there_after_a_power_cut_at_any_moment(disk, tmp_path, monkeypatch):
    kept = folder(disk.root)
    for index in range(5):
        chunk, grown = one(index=index)
        if index == 3:  # a cut of the history, which is then written whole
            grown = grown._replace(full=True)
        kept.add(chunk, grown)
        disk.kept = index + 1
        disk.cut()
    monkeypatch.undo()
    assert len(disk.cuts) > 40
    for number, (left, promised) in enumerate(disk.cuts):
        root = tmp_path / f"cut{number}"
        for name, content in left.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        again = folder(root)
        state = again.load()
        chunks = state.chunks if state else 0
        assert chunks >= promised, f"cut {number}: {chunks} of {promised} chunks, {sorted(map(str, left))}"
        for index in range(chunks):
            again.latent(index)


def test_folders_that_were_made_are_synced_too(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(files.os, "fsync", lambda opened: synced.append(Path(os.readlink(f"/proc/self/fd/{opened}"))))
    files.write_whole(tmp_path / "a" / "b" / "c.txt", lambda partial: partial.write_text("words"))
    assert [path for path in synced if path.is_dir()] == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
