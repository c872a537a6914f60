"""Finished chunks of a run on disk, so that the same run goes on from them after an interrupt or a crash.

One folder holds all runs, each in a folder named by what determines it:

    <root>/<name>/chunk-00007.safetensors   latent of a finished chunk
    <root>/<name>/state.safetensors         history after the newest chunk, and that chunk's latent

A chunk is written before the state that counts it, and each file appears whole or not at all.
"""

import re
import shutil
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .engine import Chunk
from .errors import UserError
from .files import write_whole
from .history import Clean
from .state import State, load_state, make_state, save_state

NAME = re.compile(r"[0-9a-f]{32}")  # of a run; nothing else in the root is ever touched
NEWEST = "state.safetensors"


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
        self.full = False  # this run alone is larger than the limit: no more chunks are kept

    def load(self) -> State | None:
        """History after the newest finished chunk, with that chunk's latent alone; None to start anew."""
        if not (self.path / NEWEST).exists():
            return None
        try:
            state = load_state(self.path / NEWEST)
        except UserError:  # damaged by a failing disk or by hand
            return None
        whole = all(self._file(chunk).exists() for chunk in range(self.first, state.chunks))
        if not whole or state.chunk_frames != self.chunk_frames or state.model != self.model:
            return None
        (self.path / NEWEST).touch()
        self._shape = state.latents.shape
        return state

    def latent(self, chunk: int) -> Tensor:
        """A finished chunk's latent [B, C, T, H, W], after `load`.

        Raises:
            UserError: its file is missing or damaged.
        """
        again = f"delete the folder {self.path.name} in flowcache/runs to start anew"
        try:
            latent = load_file(self._file(chunk))["latent"]
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"Chunk {chunk} of the interrupted run cannot be read ({error}); {again}.") from error
        if latent.shape != self._shape or not torch.isfinite(latent).all():
            raise UserError(
                f"Chunk {chunk} of the interrupted run is {list(latent.shape)}, expected finite numbers of shape "
                f"{list(self._shape)}; {again}."
            )
        return latent

    def add(self, chunk: Chunk, histories: Mapping[Hashable, Clean]) -> None:
        """Keeps a finished chunk [B, C, T, H, W] and the clean history after it.

        Raises:
            UserError: the folder cannot be written to.
        """
        if self.full:
            return
        latent = chunk.latent.to("cpu").contiguous()
        before = self.lead + chunk.index * self.chunk_frames
        state = make_state(latent, histories, self.chunk_frames, self.model, dropped=before)
        coming = 2 * latent.nbytes + sum(part.nbytes for clean in histories.values() for part in clean)
        kept = sum(file.stat().st_size for file in self.path.glob("chunk-*"))
        # The old state stays until the new one is whole.
        self.full = kept + 2 * coming > self.limit
        if self.full:
            return
        self._make_room(kept + 2 * coming)
        write_whole(self._file(chunk.index), lambda partial: save_file({"latent": latent}, partial))
        save_state(state, self.path / NEWEST)

    def _file(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:05}.safetensors"

    def _make_room(self, needed: int) -> None:
        """Removes other runs, the one that was not used for longest first."""
        if not self.root.exists():
            return
        others = [folder for folder in self.root.iterdir() if NAME.fullmatch(folder.name) and folder != self.path]
        others = sorted((folder for folder in others if folder.is_dir() and not folder.is_symlink()), key=_last_used)
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in others}
        while others and sum(sizes[folder] for folder in others) + needed > self.limit:
            shutil.rmtree(others.pop(0), ignore_errors=True)


def _last_used(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)
