"""What a finished run leaves behind so that another can go on from it: latents and clean history, on the CPU.

A state is a tuple of tensors, never changed after it is made: several extensions may start from the same one. On disk
it is one safetensors file.
"""

import json
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..history.snapshot import Snapshot
from .files import parse_json, write_whole

FORMAT = "flowcache-state-1"


class State(NamedTuple):
    """Attributes:
    latents: every finished frame, prefix included, [B, C, T, H, W]; without those that were let go.
    histories: the clean history of each branch.
    branches: the branches' names, in the same order.
    chunk_frames: latent frames of a chunk.
    model: what the state was made with; another model cannot go on from it. Empty if not known.
    dropped: frames before `latents` that were let go.
    """

    latents: Tensor
    histories: tuple[Snapshot, ...]
    branches: tuple[str, ...]
    chunk_frames: int
    model: str = ""
    dropped: int = 0

    def __str__(self) -> str:
        """Gives one line: ComfyUI writes a failed node's inputs into its history, and keeps them there."""
        return f"State of {self.frames} frames, {self.chunk_frames} a chunk, latents {list(self.latents.shape)}"

    @property
    def frames(self) -> int:
        """Frames of the video so far. Those beyond whole chunks are a lead: given frames before the first chunk."""
        return self.dropped + self.latents.shape[2]

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk_frames

    @property
    def by_branch(self) -> dict[Hashable, Snapshot]:
        return dict(zip(self.branches, self.histories, strict=True))

    def check(self, model: str, chunk_frames: int, latent_shape: tuple[int, ...]) -> None:
        """Raises UserError where a run of that model, chunk size and latent shape [B, C, *, H, W] cannot go on from
        it."""
        mine, asked = ((*shape[:2], *shape[3:]) for shape in (self.latents.shape, latent_shape))
        if self.model and model and self.model != model:
            raise UserError(
                f"The state was made with another model ({self.model}, this one is {model}); use that model."
            )
        if self.chunk_frames != chunk_frames:
            raise UserError(f"The state has {self.chunk_frames} frames a chunk, the run {chunk_frames}; set the same.")
        if mine != asked:
            sizes = "[batch, channels, height, width]"
            raise UserError(f"The state's latents are {mine} {sizes}, the run's {asked}; use the same size.")


def make_state(
    latents: Tensor, histories: Mapping[Hashable, Snapshot], chunk_frames: int, model: str = "", dropped: int = 0
) -> State:
    """Makes a state of latents [B, C, T, H, W] and what `Engine.save` gave; `dropped` frames came before them."""
    branches = tuple(str(name) for name in histories)
    return State(latents.to("cpu"), tuple(histories.values()), branches, chunk_frames, model, dropped)


def save_state(state: State, path: Path | str, **more: str) -> None:
    """Writes a state to a safetensors file; the file appears whole or not at all.

    Args:
        more: is put beside what the file says of itself, see `state_metadata`.

    Raises:
        UserError: the folder or file cannot be written.
    """
    tensors = {"latents": state.latents.contiguous()}
    for number, history in enumerate(state.histories):
        for name, tensor in history._asdict().items():
            tensors[f"history.{number}.{name}"] = tensor.contiguous()
    info = {name: getattr(state, name) for name in ("branches", "chunk_frames", "model", "dropped")}
    metadata = {"format": FORMAT, "state": json.dumps(info), **more}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def state_metadata(path: Path | str) -> dict[str, str]:
    """Reads what a state's file says of itself; nothing where it cannot be read."""
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return file.metadata() or {}
    return {}


def load_state(path: Path | str) -> State:
    """Reads a state; every number in the file is checked before it is believed.

    Raises:
        UserError: not a safetensors file, cut short, not a state, or a state whose parts do not fit together.
    """
    name = Path(path).name
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"'{name}' is a safetensors file but no FlowCache state; choose a saved state.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        info = parse_json(metadata["state"])
        histories = tuple(
            Snapshot(*(tensors[f"history.{number}.{part}"] for part in Snapshot._fields))
            for number in range(len(info["branches"]))
        )
        more = info["chunk_frames"], info["model"], info.get("dropped", 0)
        state = State(tensors["latents"], histories, tuple(info["branches"]), *more)
    except UserError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"Cannot read a state from '{name}': {error}. Choose a whole, saved state.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{name}' is a damaged state ({error!r}); save it again.") from error
    _check_parts(state, name)
    return state


def _check_parts(state: State, name: str) -> None:
    def fail(what: str):
        raise UserError(f"'{name}' is a damaged state: {what}; save it again.")

    if not isinstance(state.chunk_frames, int) or state.chunk_frames < 1:
        fail(f"{state.chunk_frames!r} frames a chunk")
    if not isinstance(state.dropped, int) or state.dropped < 0:
        fail(f"{state.dropped!r} frames let go")
    if not isinstance(state.model, str) or not all(isinstance(branch, str) for branch in state.branches):
        fail("names that are no text")
    if state.latents.ndim != 5 or state.latents.shape[2] == 0:
        fail(f"latents of shape {tuple(state.latents.shape)} for {state.chunk_frames} frames a chunk")
    if not torch.isfinite(state.latents).all():
        fail("latents that are not finite")
    for history in state.histories:
        if history.keys.ndim != 5 or history.values.shape != history.keys.shape:
            fail(f"keys {tuple(history.keys.shape)} and values {tuple(history.values.shape)}")
        if history.tokens.shape != history.keys.shape[:4] or history.tokens.dtype != torch.int32:
            fail(f"token numbers {tuple(history.tokens.shape)} of type {history.tokens.dtype}")
        if history.queries.numel() and (history.queries.ndim != 5 or history.queries.shape[0] != history.keys.shape[0]):
            fail(f"queries {tuple(history.queries.shape)}")
