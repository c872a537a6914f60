"""Finished chunks of a run on disk, so that the same run goes on from them after an interrupt or a crash.

One folder holds all runs, each in a folder named by what determines it:

    <root>/<name>/chunk-00007.safetensors     latent of a finished chunk
    <root>/<name>/history-00005.safetensors   state after that chunk: the whole history, and the chunk's latent
    <root>/<name>/added-00006.safetensors     the same, but only with what chunks have added to the history
    <root>/<name>/prompts.json                what the chunks show, of a run whose captions were changed

As long as nothing is dropped from the history, each chunk adds as much to it. Chunks whose keys came with one forward
have one addition, named by the newest of them. Where a budget has it cut, it is written
anew, as large as the budget, and what was written before is removed. A chunk is written before the state that counts
it, and each file appears whole or not at all. It says whose it is, and has a checksum: one that was flipped, swapped or
put there is not believed. Links are not followed.

A state's file says which format the run is of. Runs of another one are not gone on from, for a version with another
format computes other bits; they are removed like all others when there is no room.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine.loop import Chunk
from ..errors import UserError
from ..history.snapshot import Snapshot, SnapshotDelta
from .files import check_header, check_regular, checksum, parse_json, read_json_text, write_whole
from .state import State, load_state, make_state, save_state, state_metadata

FORMAT = "flowcache-run-4"  # runs of version 0.1.0 say none
NAME = re.compile(r"[0-9a-f]{32}")  # of a run; nothing else in the root is ever touched
PROMPTS = "prompts.json"
Kind = Literal["chunk", "history", "added"]


class RunFolder:
    """One run's folder.

    Args:
        root: holds the runs; it is made when the first chunk is written.
        name: 32 hexadecimal digits that stand for everything that determines the run.
        limit: bytes that all runs together may take. The ones that were not used for longest are removed to keep to it.
        first: number of the first generated chunk.
        chunk_frames: latent frames of a chunk.
        model: kept in the state, see `state.State`.
        lead: given frames before the first chunk that fill none.
    """

    def __init__(
        self, root: Path | str, name: str, limit: int, first: int, chunk_frames: int, model: str = "", lead: int = 0
    ):
        if not NAME.fullmatch(name):
            raise ValueError(f"The run is called '{name}', expected 32 hexadecimal digits.")
        self.root, self.path, self.limit = Path(root), Path(root) / name, limit
        self.first, self.chunk_frames, self.model, self.lead = first, chunk_frames, model, lead
        self._shape = torch.Size()  # of a chunk's latent, by the state that was loaded
        self.begun: bool = False  # a history is there that can be added to
        self.full: bool = False  # this run alone is larger than the limit: no more chunks are kept

    def load(
        self, recent: int = 0, before: Tensor | None = None, first: int = 0, beginning: Tensor | None = None
    ) -> State | None:
        """Reads the history after the newest finished chunk, with that chunk's latent alone; None to start anew.

        Args:
            recent: where more is needed: so many of the newest frames, or a few more.
            first: where those are needed: so many frames that the video began with, at most a chunk's.
            beginning: those frames, where they are not of this run.
            before: latents that stand before the first generated chunk, [B, C, T, H, W], of which some may be of them.

        Raises:
            UserError: the run's folder is a link, or a chunk that is needed cannot be read.
        """
        self._check_link()
        newest = max(self.path.glob("history-*"), default=None)
        last = None if newest is None else self._read(newest)
        if newest is None or last is None or self.prompts() is None:
            return None
        parts = [last.histories]
        for file in sorted(self.path.glob("added-*")):
            if file < self._file("added", last.chunks):
                continue
            added = self._read(file)
            if added is None or not self._follows(added, last):
                break
            parts.append(added.histories)
            last = added
        if not all(self._file("chunk", chunk).exists() for chunk in range(self.first, last.chunks)):
            return None
        with suppress(FileNotFoundError):  # another server has just removed the run
            os.utime(newest)
        self._shape, self.begun = last.latents.shape, True
        state = last._replace(histories=_joined(parts))
        return self._with_latents(state, recent, before, first, beginning) if recent else state

    def _with_latents(
        self, state: State, frames: int, before: Tensor | None, first: int, beginning: Tensor | None
    ) -> State:
        """The state with its newest frames' latents and those of its beginning, as far as they are there."""
        needed = -(-frames // self.chunk_frames)
        chunks = range(max(self.first, state.chunks - needed), state.chunks - 1)
        parts = [*(self.latent(chunk) for chunk in chunks), state.latents]
        missing = frames - sum(part.shape[2] for part in parts)
        if missing > 0 and before is not None:
            parts.insert(0, before[:, :, -missing:].to(state.latents))
        latents = torch.cat(parts, dim=2)
        dropped = state.frames - latents.shape[2]
        if not first or dropped < first:
            beginning = None
        elif beginning is None:
            beginning = self.latent(self.first)
        beginning = None if beginning is None else beginning[:, :, :first].to(latents)
        return state._replace(latents=latents, dropped=dropped, beginning=beginning)

    def outdated(self) -> bool:
        """Says whether runs of this model are there that an earlier version of FlowCache kept."""
        return any(self._is_outdated(file) for file in self.root.glob("*/history-*"))

    def latent(self, chunk: int) -> Tensor:
        """Reads a finished chunk's latent [B, C, T, H, W], after `load`.

        Raises:
            UserError: its file is missing, damaged or another chunk's.
        """
        again = f"delete the folder {self.path.name} in flowcache/runs to start anew"
        file = self._file("chunk", chunk)
        try:
            check_header(file, follow=False)
            with safe_open(file, "pt") as opened:
                latent, told = opened.get_tensor("latent"), opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"Chunk {chunk} of the interrupted run cannot be read ({error}); {again}.") from error
        if told != self._told(chunk, latent):
            raise UserError(f"Chunk {chunk} of the interrupted run is damaged or another chunk; {again}.")
        if latent.shape != self._shape or not torch.isfinite(latent).all():
            raise UserError(
                f"Chunk {chunk} of the interrupted run is {list(latent.shape)}, expected finite numbers of shape "
                f"{list(self._shape)}; {again}."
            )
        return latent

    def prompts(self) -> str | None:
        """Reads what `keep_prompts` was given last: empty where nothing was, None where that is damaged."""
        file = self.path / PROMPTS
        if not file.exists() and not file.is_symlink():
            return ""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            check_regular(file, follow=False)
            told = parse_json(read_json_text(file))
            text = told["prompts"]
            if told == self._told_prompts(text):
                return text
        return None

    def keep_prompts(self, text: str) -> None:
        """Keeps what the chunks show, those to come included, in place of what was kept before; empty: nothing.

        Raises:
            UserError: the folder cannot be written to or is a link.
        """
        self._check_link()
        file = self.path / PROMPTS
        if text:
            write_whole(file, lambda partial: partial.write_text(json.dumps(self._told_prompts(text))))
            return
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"Cannot remove {file} ({error.strerror}); remove it, or disconnect 'resume'.") from error

    def _told_prompts(self, text: str) -> dict[str, str]:
        """What the file of the prompts holds."""
        found = f"{zlib.crc32(text.encode()):08x}"
        return {"run": FORMAT, "of": self.path.name, "prompts": text, "checksum": found}

    def add(self, chunk: Chunk, delta: SnapshotDelta, before: Sequence[Chunk] = ()) -> None:
        """Keeps a finished chunk [B, C, T, H, W] and what the clean history has grown by.

        Args:
            before: chunks that finished before it, of which the history holds as much and no file yet.

        Raises:
            UserError: the folder cannot be written to or is a link, or the history is not finite.
        """
        if self.full:
            return
        self._check_link()
        latent = chunk.latent.to("cpu").contiguous()
        dropped = self.lead + chunk.number * self.chunk_frames
        state = make_state(
            latent, delta.histories, self.chunk_frames, self.model, dropped, delta.shown, shot=delta.shot
        )
        # What a whole history replaces stays until that is written.
        needed = (2 + len(before)) * latent.nbytes + sum(part.nbytes for clean in state.histories for part in clean)
        needed += sum(file.st_size for file in _files(self.path))
        self.full = needed > self.limit
        if self.full:
            return
        self._make_room(needed)
        added = list(self.path.glob("added-*"))
        written = self._file("history" if delta.full else "added", chunk.number)
        for number, part in [*before, Chunk(chunk.number, latent)]:
            part = part.to("cpu").contiguous()
            write = partial(save_file, {"latent": part}, metadata=self._told(number, part))
            write_whole(self._file("chunk", number), write)
        # What follows an addition that could not be read is of the run before the interrupt.
        oldest = self._file("added", min([chunk.number, *(one.number for one in before)]))
        replaced = [*self.path.glob("history-*"), *added] if delta.full else [file for file in added if file >= oldest]
        save_state(state, written, run=FORMAT, of=self.path.name)
        for file in replaced:
            if file != written:
                with suppress(PermissionError):  # on Windows, while it is mapped; a newer history is read before it
                    file.unlink(missing_ok=True)  # by another server that does the same run
        self.begun = True

    def _file(self, kind: Kind, chunk: int) -> Path:
        return self.path / f"{kind}-{chunk:05}.safetensors"

    def _check_link(self) -> None:
        if self.path.is_symlink():
            raise UserError(
                f"The folder {self.path.name} in flowcache/runs is a link, which is not followed; remove it."
            )

    def _told(self, chunk: int, latent: Tensor) -> dict[str, str]:
        """What a chunk's file says of itself."""
        return {"run": FORMAT, "of": self.path.name, "chunk": str(chunk), "checksum": checksum({"latent": latent})}

    def _read(self, file: Path) -> State | None:
        """A state of this run; None where it is not there, of another, or damaged by a failing disk or by hand."""
        told = {} if file.is_symlink() else state_metadata(file)
        if (told.get("run"), told.get("of")) != (FORMAT, self.path.name):
            return None
        try:
            state = load_state(file)
        except UserError:
            return None
        mine = (state.chunk_frames, state.model) == (self.chunk_frames, self.model)
        return state if mine and file.stem.endswith(f"-{state.chunks - 1:05}") else None

    def _follows(self, added: State, last: State) -> bool:
        """Whether an addition holds the tokens of just the chunks that come after a state."""
        frames = (added.chunks - last.chunks) * self.chunk_frames
        if _layout(added) != _layout(last) or frames <= 0:
            return False
        for clean in added.histories:
            a_frame, rest = divmod(clean.tokens.shape[3], frames)
            first = a_frame * (self.lead + last.chunks * self.chunk_frames + added.shot.moved)
            expected = torch.arange(first, first + a_frame * frames, dtype=torch.int32)
            if rest or not torch.equal(clean.tokens, expected.expand_as(clean.tokens)):
                return False
        return True

    def _is_outdated(self, file: Path) -> bool:
        ours = NAME.fullmatch(file.parent.name) and not file.parent.is_symlink()
        told = state_metadata(file) if ours else {}
        with suppress(ValueError, TypeError, AttributeError):
            return (
                "state" in told and told.get("run") != FORMAT and parse_json(told["state"]).get("model") == self.model
            )
        return False

    def _make_room(self, needed: int) -> None:
        """Removes other runs, the one that was not used for longest first."""
        if not self.root.is_dir():
            return
        others = [folder for folder in self.root.iterdir() if NAME.fullmatch(folder.name) and folder != self.path]
        others = sorted((folder for folder in others if folder.is_dir() and not folder.is_symlink()), key=_last_used)
        sizes = {folder: sum(file.st_size for file in _files(folder)) for folder in others}
        while others and sum(sizes[folder] for folder in others) + needed > self.limit:
            shutil.rmtree(others.pop(0), ignore_errors=True)


def _layout(state: State) -> list:
    """What must be alike in two states for their histories to follow one another."""
    sizes = [(clean.keys.shape[:3], clean.keys.shape[4], clean.keys.dtype) for clean in state.histories]
    return [state.branches, state.latents.shape, sizes]


def _joined(parts: Sequence[tuple[Snapshot, ...]]) -> tuple[Snapshot, ...]:
    """The history of each branch, from its parts in time order; queries are the newest."""
    grown = ("keys", "values", "tokens")
    return tuple(
        branch[-1]._replace(**{name: torch.cat([getattr(part, name) for part in branch], dim=3) for name in grown})
        for branch in zip(*parts, strict=True)
    )


def _last_used(folder: Path) -> float:
    return max((file.st_mtime for file in _files(folder)), default=0.0)


def _files(folder: Path) -> list[os.stat_result]:
    """Of what is in a folder; another server may be writing or removing that run."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for file in folder.iterdir():
            with suppress(FileNotFoundError):
                found.append(file.stat())
    return found
