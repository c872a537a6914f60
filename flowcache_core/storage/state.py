"""What a finished run leaves behind so that another can go on from it: latents and clean history, on the CPU.

A state is a tuple of tensors, never changed after it is made: several extensions may start from the same one. On disk
it is one safetensors file.
"""

import json
import re
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..engine.anew import Anew, Before
from ..errors import UserError
from ..history.snapshot import Snapshot
from ..schedule import Shot
from .files import check_header, checksum, parse_json, write_whole

FORMAT = "flowcache-state-1"
PARTS = Snapshot._fields
FLOATS = ("keys", "values", "queries")  # of them
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_BRANCHES = 64
LONGEST_PROMPTS = 2**20  # characters
SHOWN = re.compile("([0-9a-f]{32})?")  # of texts, `digest.digest_of`
NUMBERS = ("branches", "chunk_frames", "model", "dropped", "prompts", "shown", "shot")  # what is no tensor
LARGEST = 2**31  # frames; token numbers are 32 bits


class State(NamedTuple):
    """Attributes:
    latents: every finished frame, prefix included, [B, C, T, H, W]; without those that were let go.
    histories: the clean history of each branch.
    branches: the branches' names, in the same order.
    chunk_frames: latent frames of a chunk.
    model: what the state was made with; another model cannot go on from it. Empty if not known.
    dropped: frames before `latents` that were let go.
    prompts: what its chunks show, as Prompts over Time, where a run that could be steered knew it.
    shown: stands for the texts that the history was computed for, of a family that computes it anew for others.
    beginning: frames that the video began with, of a family that computes its history from them, where `latents` are
        without them.
    shot: that the newest chunk is in, of a family that makes videos of several.
    """

    latents: Tensor
    histories: tuple[Snapshot, ...]
    branches: tuple[str, ...]
    chunk_frames: int
    model: str = ""
    dropped: int = 0
    prompts: str = ""
    shown: str = ""
    beginning: Tensor | None = None
    shot: Shot = Shot()

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

    def begins_with(self, frames: int) -> Tensor | None:
        """The frames that the video began with, so many, where they are there."""
        return self.latents[:, :, :frames] if self.dropped == 0 else self.beginning

    def before(self, rule: Anew | None) -> Before | None:
        """What a run that goes on from it needs of its frames, where its family computes a history anew."""
        return None if rule is None else Before(self.latents, self.shown, self.begins_with(rule.first))

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
    latents: Tensor,
    histories: Mapping[Hashable, Snapshot],
    chunk_frames: int,
    model: str = "",
    dropped: int = 0,
    shown: str = "",
    beginning: Tensor | None = None,
    shot: Shot = Shot(),
) -> State:
    """Makes a state of latents [B, C, T, H, W] and what `Engine.save` gave; `dropped` frames came before them, of which
    `beginning` is kept."""
    branches = tuple(str(name) for name in histories)
    latents, beginning = latents.to("cpu"), beginning.to("cpu") if beginning is not None and dropped else None
    return State(
        latents, tuple(histories.values()), branches, chunk_frames, model, dropped, shown=shown, beginning=beginning,
        shot=shot,
    )  # fmt: skip


def save_state(state: State, path: Path | str, **more: str) -> None:
    """Writes a state to a safetensors file; the file appears whole or not at all.

    Args:
        more: is put beside what the file says of itself, see `state_metadata`.

    Raises:
        UserError: the folder or file cannot be written, or the state holds NaN or infinite values.
    """
    if fault := _fault(state):
        raise UserError(
            f"The run's state has {fault}, so nothing can go on from it: the model's weights are damaged, or overflow "
            f"in this weight type; load the file again, or choose another weight type."
        )
    tensors = {"latents": state.latents.contiguous()}
    if state.beginning is not None:
        tensors["beginning"] = state.beginning.contiguous()
    for number, history in enumerate(state.histories):
        for name, tensor in history._asdict().items():
            tensors[f"history.{number}.{name}"] = tensor.contiguous()
    info = {name: getattr(state, name) for name in NUMBERS}
    metadata = {"format": FORMAT, "state": json.dumps(info), "checksum": checksum(tensors), **more}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def state_metadata(path: Path | str) -> dict[str, str]:
    """Reads what a state's file says of itself; nothing where it cannot be read."""
    with suppress(SafetensorError, OSError):
        check_header(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    return {}


def load_state(path: Path | str) -> State:
    """Reads a state; every number in the file is checked before it is believed.

    Raises:
        UserError: not a safetensors file, cut short, not a state, or a state whose parts do not fit together.
    """
    name = Path(path).name
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"'{name}' is a safetensors file but no FlowCache state; choose a saved state.")
            info = parse_json(metadata["state"])
            if len(info["branches"]) > MOST_BRANCHES:
                raise ValueError(f"{len(info['branches'])} branches")
            names = ["latents", *(f"history.{at}.{part}" for at in range(len(info["branches"])) for part in PARTS)]
            names += ["beginning"] if "beginning" in file.keys() else []
            tensors = {name: file.get_tensor(name) for name in names}
        if "checksum" in metadata and metadata["checksum"] != checksum(tensors):  # states of 0.1.0 have none
            raise ValueError("its checksum is another")
        beginning = tensors.pop("beginning", None)
        latents, *parts = tensors.values()
        histories = tuple(Snapshot(*parts[at : at + len(PARTS)]) for at in range(0, len(parts), len(PARTS)))
        more = {name: info[name] for name in ("dropped", "prompts", "shown") if name in info}
        more |= {"shot": Shot(*info["shot"])} if "shot" in info else {}
        state = State(
            latents,
            histories,
            tuple(info["branches"]),
            info["chunk_frames"],
            info["model"],
            beginning=beginning,
            **more,
        )
        fault = _fault(state)
    except UserError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"Cannot read a state from '{name}': {error}. Choose a whole, saved state.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{name}' is a damaged state ({error!r}); save it again.") from error
    if fault:
        raise UserError(f"'{name}' is a damaged state: {fault}; save it again.")
    return state


def _begins(beginning: Tensor, latents: Tensor, dropped: int) -> bool:
    """Whether these may be frames before latents of which so many were let go."""
    if beginning.ndim != 5 or (*beginning.shape[:2], *beginning.shape[3:]) != (*latents.shape[:2], *latents.shape[3:]):
        return False
    return 0 < beginning.shape[2] <= dropped


def _fault(state: State) -> str | None:
    """What of a state does not fit together, if anything."""
    latents, frames = state.latents, state.chunk_frames
    if not isinstance(frames, int) or not 1 <= frames <= LARGEST:
        return f"{frames!r:.20} frames a chunk"
    if not isinstance(state.dropped, int) or not 0 <= state.dropped <= LARGEST:
        return f"{state.dropped!r:.20} frames let go"
    if not isinstance(state.prompts, str) or len(state.prompts) > LONGEST_PROMPTS:
        return "prompts that are no text"
    if not isinstance(state.shown, str) or not SHOWN.fullmatch(state.shown):
        return "texts that have no name"
    if not all(isinstance(at, int) and least <= at <= LARGEST for at, least in zip(state.shot, Shot(), strict=True)):
        return f"a shot of {state.shot!r:.40}"
    if not isinstance(state.model, str) or not all(isinstance(branch, str) for branch in state.branches):
        return "names that are no text"
    if latents.ndim != 5 or 0 in latents.shape:
        return f"latents of shape {tuple(latents.shape)} for {frames} frames a chunk"
    beginning = state.beginning
    if beginning is not None and not _begins(beginning, latents, state.dropped):
        return f"a beginning of shape {tuple(beginning.shape)}"
    for what, tensor in [
        ("latents", latents),
        *([] if beginning is None else [("beginning", beginning)]),
        *((part, getattr(one, part)) for one in state.histories for part in FLOATS),
    ]:
        if tensor.dtype not in COMPUTED:
            return f"{what} of type {tensor.dtype}"
        if not all(torch.isfinite(part).all() for part in tensor):
            return f"{what} that are not finite"
    for history in state.histories:
        keys, queries = history.keys, history.queries
        if keys.ndim != 5 or history.values.shape != keys.shape or keys.shape[1] != latents.shape[0]:
            return f"keys {tuple(keys.shape)} and values {tuple(history.values.shape)}"
        if history.tokens.shape != keys.shape[:4] or history.tokens.dtype != torch.int32:
            return f"token numbers {tuple(history.tokens.shape)} of type {history.tokens.dtype}"
        most = (state.frames + state.shot.moved) * latents.shape[3] * latents.shape[4]
        if history.tokens.numel() and not (0 <= history.tokens.min() and history.tokens.max() < most):
            return f"token numbers that are not below {most}"
        if not all((part[..., 1:] > part[..., :-1]).all() for part in history.tokens):
            return "token numbers out of order"
        if queries.numel() and (
            queries.ndim != 5 or queries.shape[:2] != keys.shape[:2] or queries.shape[4] != keys.shape[4]
        ):
            return f"queries {tuple(queries.shape)}"
    return None
