"""Bounded store of the keys and values that a chunk attends to, for one run and one branch of guidance.

Each layer has one buffer, laid out as

    [ given end | given lead | clean tokens, in time order | active chunk | next active chunk | ... ]

Given frames that fill no chunk (a start image, an end image) stay whatever the budget is. An end is clean from the
start and stands at its own place in time, behind everything else.

A chunk writes its keys and values into its slot and attends to everything before the slot's end: the clean history,
the active chunks before it and itself. That is one stretch of memory, so attention needs neither a mask nor a copy. A
finished chunk becomes clean by moving a boundary. When the next chunk needs room, the clean tokens are cut to the
budget; the tokens that stay may differ from head to head.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .compression import TILE_BYTES, Compression, choose
from .errors import UserError
from .rotary import Rotary, rotate
from .schedule import END, LEAD, ChunkSchedule

SYSTEM = torch.device("cpu")  # its memory is the system's
MOVED = (
    "out of device memory: the history was moved to system memory, which is slower; a history budget makes it smaller"
)
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HistorySettings:
    """How much clean history a run keeps.

    Attributes:
        budget: clean chunks that are kept, or None for all of them.
        compression: how the history is cut when it is over budget.
        relative: rotary positions count from the start of the window, not of the video, so that a run of any length
            uses only positions from 0 to (budget + active) chunks. Needs a budget. Costs a copy of the part of each key
            that is rotated by time.
        memory: "auto" keeps the history on the device that computes, and moves it to system memory when that device
            runs out; "system" keeps it there from the start. One layer's history at a time is then brought back.
    """

    budget: int | None = None
    compression: Compression = field(default_factory=Compression)
    relative: bool = False
    memory: Literal["auto", "system"] = "auto"

    def __post_init__(self):
        if self.budget is not None and self.budget < max(1, self.compression.protected_chunks):
            raise UserError(
                f"The history budget is {self.budget} chunks, but at least {max(1, self.compression.protected_chunks)} "
                "must stay; raise the budget or protect fewer chunks."
            )
        if self.relative and self.budget is None:
            raise UserError(
                "Positions relative to the window need a history budget; set one, or use absolute positions."
            )

    @property
    def asks(self) -> bool:
        """Whether queries are kept for the next cut."""
        return self.budget is not None and self.compression.rule == "flowcache"

    def capacity(self, schedule: ChunkSchedule) -> int:
        """Chunks that a run needs room for."""
        everything = schedule.total_chunks
        return everything if self.budget is None else min(everything, self.budget + schedule.max_active)


@dataclass(frozen=True)
class Given:
    """Frames that are given and fill no chunk.

    Attributes:
        lead: frames before the first chunk.
        end: frames after the last chunk.
        end_at: number in the video of the first of those.
    """

    lead: int = 0
    end: int = 0
    end_at: int = 0


@dataclass(frozen=True)
class HistoryShape:
    """Sizes of one branch's history.

    Attributes:
        layers, batch, heads, head_dim: of the network's keys.
        grid: rows and columns of tokens of a frame.
        chunk_frames: latent frames of a chunk.
        capacity: chunks that there is room for, clean and active.
        given: frames beside them.
    """

    layers: int
    batch: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    chunk_frames: int
    capacity: int
    given: Given = Given()

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.chunk_frames

    @property
    def tokens(self) -> int:
        return self.chunk_tokens * self.capacity + self.frame_tokens * (self.given.lead + self.given.end)

    @property
    def end_tokens(self) -> int:
        return self.frame_tokens * self.given.end

    @property
    def given_tokens(self) -> int:
        return self.end_tokens + self.frame_tokens * self.given.lead

    def bytes(self, itemsize: int, time_dims: int = 0) -> int:
        """Memory of the buffers: keys, values, token numbers, and time parts where positions are relative."""
        rows = self.layers * self.batch * self.heads * self.tokens
        return rows * ((2 * self.head_dim + time_dims) * itemsize + 4)

    def planned_bytes(self, settings: HistorySettings, itemsize: int) -> int:
        """What a run allocates for one branch of guidance, known before it begins: buffers and kept queries.

        For networks of the Wan layout, where there are as many query heads as key heads.
        """
        asking = min(settings.compression.queries or self.chunk_tokens, self.chunk_tokens)
        queries = self.layers * self.batch * self.heads * asking * self.head_dim * itemsize
        time_dims = Rotary(self.head_dim).parts[0] if settings.relative else 0
        return self.bytes(itemsize, time_dims) + (queries if settings.asks else 0)


class Clean(NamedTuple):
    """The clean part of a history, to be kept beyond a run.

    Attributes:
        keys, values: [layers, B, heads, tokens, D]; keys are rotated by their place in the video.
        tokens: [layers, B, heads, tokens] number of each token in the video.
        queries: [layers, B, query heads, Q, D] for the next compression, or an empty tensor.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    queries: Tensor


class Grown(NamedTuple):
    """What clean histories have grown by since they were last looked at.

    Attributes:
        histories: of each branch, its new tokens; or all of them.
        whole: all, because older ones were dropped since, or nothing was looked at before.
    """

    histories: dict[Hashable, Clean]
    whole: bool


class History:
    """Keys and values of one branch.

    Args:
        shape: sizes.
        rotary: gives the rotary table of a run of frames.
        settings: budget, compression, positions.
        dtype, device: of the keys; whatever the chunk has.
    """

    def __init__(
        self, shape: HistoryShape, rotary, settings: HistorySettings, dtype: torch.dtype, device: torch.device
    ):
        self.shape = shape
        self.rotary = rotary
        self.settings = settings
        self.device = device  # that computes
        self.dtype = dtype
        self.time_dims = rotary.parts[0] if settings.relative else 0
        self.moved = False  # to system memory, because the device ran out of its own
        fits = settings.memory == "auto" and not _runs_out(lambda: self._allocate(device))
        if not fits:
            self.moved = settings.memory == "auto"
            self._allocate(SYSTEM)
        self.queries: list[Tensor] = []  # a layer: of the chunk that asks at the next compression
        self._tables: dict[int, Tensor] = {}  # rotary table of each active chunk
        self.clean = shape.end_tokens  # tokens, those of the end included
        self.has_end = False  # whether the end's tokens are there yet
        self.active: list[int] = []  # chunk numbers, oldest first, each with a slot behind the clean tokens
        self.shift = 0  # frames by which positions are moved towards zero
        self.taken = 0  # tokens at the front that are loaded or that `grown` has given out; 0 once one is dropped

    def _allocate(self, place: torch.device) -> None:
        shape = self.shape
        size = (shape.layers, shape.batch, shape.heads, shape.tokens)
        self.keys = torch.empty(*size, shape.head_dim, dtype=self.dtype, device=place)
        self.values = torch.empty_like(self.keys)
        # Number of each token in the whole video: frame x tokens a frame + place in the frame.
        self.tokens = torch.zeros(size, dtype=torch.int32, device=place)
        self.unrotated = self.keys.new_empty(*size, self.time_dims) if self.time_dims else None
        self.in_system_memory = place == SYSTEM and (self.settings.memory == "system" or self.moved)

    def to_system_memory(self) -> bool:
        """Makes room on the device that computes; False where the history is not there any more."""
        if self.in_system_memory:
            return False
        self.keys, self.values, self.tokens = (part.to(SYSTEM) for part in (self.keys, self.values, self.tokens))
        self.unrotated = None if self.unrotated is None else self.unrotated.to(SYSTEM)
        self.queries = [query.to(SYSTEM) for query in self.queries]
        self.in_system_memory = self.moved = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _sparing(self, work: Callable[[], object]) -> None:
        """Does work that may be begun anew; once more in system memory where the device runs out of its own."""
        if not _runs_out(work):
            return
        if not self.to_system_memory():
            raise torch.cuda.OutOfMemoryError("Out of memory, with the history in system memory already.")
        work()

    def _buffers(self) -> list[Tensor]:
        return [self.keys, self.values, self.tokens] + ([] if self.unrotated is None else [self.unrotated])

    @property
    def bytes(self) -> int:
        """Of the buffers, and of the queries that are kept for the next cut."""
        kept = [query for query in self.queries if query is not None]
        return sum(part.nbytes for part in (*self._buffers(), *kept))

    @property
    def bytes_used(self) -> int:
        """Of the buffers, what clean and active chunks take up now."""
        filled = self.clean + len(self.active) * self.shape.chunk_tokens
        return self.bytes * filled // self.shape.tokens

    def open(self, chunk: int) -> None:
        """Gives a chunk a slot; the clean history is cut first where there is no room."""
        if chunk >= 0:
            self._make_room()
        if self.settings.relative:
            after = self.first_frame(chunk) + self.frames(chunk) if chunk != END else self._frames_done()
            self._move(max(0, after - self.shape.given.lead - self.window))
        if chunk != END:
            self.active.append(chunk)
        start, end = self.slot(chunk)
        first = self.first_frame(chunk) * self.shape.frame_tokens
        self.tokens[:, :, :, start:end] = torch.arange(first, first + end - start, device=self.tokens.device)

    def _make_room(self) -> None:
        room = self.shape.tokens - self.clean - len(self.active) * self.shape.chunk_tokens
        budget = self.settings.budget
        over = budget is not None and self.clean - self.shape.given_tokens > budget * self.shape.chunk_tokens
        if over or room < self.shape.chunk_tokens:
            if budget is None:
                raise RuntimeError(f"The history has room for {self.shape.capacity} chunks and is full.")
            self._compress(budget * self.shape.chunk_tokens)

    @property
    def window(self) -> int:
        """Frames that positions run over where they are relative, a lead not counted."""
        return self.shape.capacity * self.shape.chunk_frames

    def first_frame(self, chunk: int) -> int:
        """Number in the video of a chunk's first frame."""
        given = self.shape.given
        return {LEAD: 0, END: given.end_at}.get(chunk, given.lead + chunk * self.shape.chunk_frames)

    def _frames_done(self) -> int:
        if self.clean == self.shape.end_tokens:
            return 0
        return int(self._frames_of(self.tokens[:, :, :, self.clean - 1]).max()) + 1

    def frames(self, chunk: int) -> int:
        given = self.shape.given
        return {LEAD: given.lead, END: given.end}.get(chunk, self.shape.chunk_frames)

    def sees_end(self, chunk: int) -> bool:
        """A chunk looks at a given end; where positions are relative, only from within a window's length."""
        near = self.shape.given.end_at - self.first_frame(chunk) <= self.window
        return self.has_end and (near or not self.settings.relative)

    def view(self, chunk: int, visible: int | None = None) -> "ChunkView":
        """What a forward of an active chunk sees.

        Args:
            chunk: an active chunk; its slot is opened if it has none.
            visible: how many of the chunks before it may be seen; None for all. Needs an uncut history.
        """
        if chunk not in self.active and not (chunk == END and self.has_end):
            self.open(chunk)
        return ChunkView(self, chunk, visible)

    def commit(self, chunk: int) -> None:
        """The oldest active chunk is clean from now on; or the given end is there."""
        if chunk == END:
            self.has_end = True
            return
        if not self.active or self.active[0] != chunk:
            raise RuntimeError(f"Chunk {chunk} cannot become clean: the active chunks are {self.active}.")
        self.active.pop(0)
        self._tables.pop(chunk, None)
        self.clean += self.frames(chunk) * self.shape.frame_tokens

    def slot(self, chunk: int) -> tuple[int, int]:
        """First token and end of an active chunk's slot."""
        start = 0 if chunk == END else self.clean + self.active.index(chunk) * self.shape.chunk_tokens
        return start, start + self.frames(chunk) * self.shape.frame_tokens

    def table(self, chunk: int) -> Tensor:
        """Rotary table of an active chunk, [2, tokens, D / 2]."""
        if chunk not in self._tables:
            first = self.first_frame(chunk) - self.shift - (self._beyond() if chunk == END else 0)
            frames = torch.arange(first, first + self.frames(chunk), device=self.device)
            self._tables[chunk] = self.rotary.table(frames, *self.shape.grid)
        return self._tables[chunk]

    def asks(self, chunk: int) -> bool:
        """Whether a chunk's queries are kept for the next compression."""
        if not self.settings.asks or chunk < 0:
            return False
        return self.settings.compression.asked_by == "newest" or chunk == self.active[0]

    def save(self, first: int = 0, finished: int = 0) -> Clean:
        """A copy of the clean history on the CPU.

        Args:
            first: token to begin with.
            finished: so many of the oldest active chunks count as clean.
        """
        kept = slice(max(first, self.shape.end_tokens), self.clean + finished * self.shape.chunk_tokens)
        keys, values, tokens = (
            part[:, :, :, kept].to("cpu", copy=True) for part in (self.keys, self.values, self.tokens)
        )
        if self.unrotated is not None:
            self._turn_to(keys, self.unrotated[:, :, :, kept].cpu(), self._frames_of(tokens))
        queries = torch.stack([query.cpu() for query in self.queries]) if self.queries else keys.new_empty(0)
        return Clean(keys, values, tokens, queries)

    def load(self, saved: Clean) -> None:
        """Takes over the clean history of an earlier run, lead included, cut to this run's budget where it is larger.

        Raises:
            UserError: the history is of another model, size or batch, or too long for this run's room.
        """
        count = saved.keys.shape[3]
        expected = (self.shape.layers, self.shape.batch, self.shape.heads, count, self.shape.head_dim)
        if tuple(saved.keys.shape) != expected:
            raise UserError(
                f"The state's history has shape {tuple(saved.keys.shape)}, this run needs {expected} "
                "[layers, batch, heads, tokens, head width]: the state is of another model, size or batch."
            )
        budget, lead, end = self.settings.budget, self.shape.given_tokens - self.shape.end_tokens, self.shape.end_tokens
        keep = count if budget is None else lead + budget * self.shape.chunk_tokens
        cut = count > keep
        if cut:
            saved = self._cut(saved, lead, keep - lead)
            count = saved.keys.shape[3]
        if count > self.shape.tokens - end:
            raise UserError(
                f"The state holds {count} tokens of history, and there is room for {self.shape.tokens - end}."
            )
        place = slice(end, end + count)
        self.keys[:, :, :, place].copy_(saved.keys)
        self.values[:, :, :, place].copy_(saved.values)
        self.tokens[:, :, :, place].copy_(saved.tokens)
        self.queries = [query.to(self.keys) for query in saved.queries]
        if self.unrotated is not None:
            frames = self._frames_of(self.tokens[:, :, :, place])
            self.unrotated[:, :, :, place] = self._turn(self.keys[:, :, :, place, : self.time_dims], -frames)
        self.clean = end + count
        self.taken = 0 if cut else self.clean

    def _choose(self, keys: Tensor, queries: Tensor | None, keep: int, layer: int) -> Tensor:
        settings, shape = self.settings.compression, self.shape
        return choose(settings, queries, keys, keep, shape.frame_tokens, shape.chunk_tokens, seed=layer)

    def _head_groups(self, queries: Tensor | None) -> list[tuple[slice, slice]]:
        """Key heads, and the query heads that share them, in groups small enough to be scored at once."""
        shape = self.shape
        size = max(1, TILE_BYTES // (4 * shape.batch * self.clean * shape.head_dim))
        share = queries.shape[1] // shape.heads if queries is not None else 1
        starts = range(0, shape.heads, size)
        return [(slice(at, at + size), slice(at * share, (at + size) * share)) for at in starts]

    def _compress(self, keep: int) -> None:
        """Cuts the clean tokens that are not given to `keep` and moves the active chunks up behind them."""
        given = self.shape.given_tokens
        if self.clean - given <= keep:
            raise RuntimeError(
                f"The history is full with {self.clean} clean tokens, and {given + keep} of them must stay."
            )
        for layer in range(self.shape.layers):
            for heads, query_heads in self._head_groups(self.queries[layer] if self.queries else None):
                self._sparing(partial(self._compress_heads, layer, heads, query_heads, keep))
        self.clean = given + keep
        self.taken = 0

    def _compress_heads(self, layer: int, heads: slice, query_heads: slice, keep: int) -> None:
        """All new tensors are made before the first buffer is changed: nothing is half done where memory runs out."""
        given = self.shape.given_tokens
        count, filled = self.clean - given, self.clean - given + len(self.active) * self.shape.chunk_tokens
        asked = self.queries[layer][:, query_heads] if self.queries else None
        kept = self._choose(self.keys[layer, :, heads, given : self.clean], asked, keep, layer)
        parts = [buffer[layer, :, heads, given:] for buffer in self._buffers()]
        fresh = [torch.cat([_gather(part[:, :, :count], kept), part[:, :, count:filled]], dim=2) for part in parts]
        for part, new in zip(parts, fresh, strict=True):
            part[:, :, : new.shape[2]] = new

    def _cut(self, saved: Clean, lead: int, keep: int) -> Clean:
        layers = []
        for layer in range(self.shape.layers):
            queries = saved.queries[layer] if len(saved.queries) else None
            kept = self._choose(saved.keys[layer, :, :, lead:], queries, keep, layer) + lead
            kept = torch.cat([torch.arange(lead).expand(*kept.shape[:2], lead), kept], dim=2)
            layers.append([_gather(part[layer], kept) for part in saved[:3]])
        keys, values, tokens = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return Clean(keys, values, tokens, saved.queries)

    def _move(self, shift: int) -> None:
        """Counts positions from frame `shift` on; tokens from before it that were kept are placed at zero."""
        if shift == self.shift or self.unrotated is None:
            return
        self.shift = shift
        self._tables.clear()
        self._sparing(self._place_all)

    def _place_all(self) -> None:
        """Rotates all keys to their positions."""
        assert self.unrotated is not None
        filled = self.clean + len(self.active) * self.shape.chunk_tokens
        frames = (self._frames_of(self.tokens[:, :, :, :filled]) - self.shift).clamp(min=0)
        frames[:, :, :, : self.shape.end_tokens] -= self._beyond()
        self._turn_to(self.keys[:, :, :, :filled], self.unrotated[:, :, :, :filled], frames)

    def _beyond(self) -> int:
        """Frames by which a given end is drawn nearer, so that it stands right behind the window at the farthest."""
        given = self.shape.given
        return max(0, given.end_at - self.shift - self.window - given.lead) if self.settings.relative else 0

    def _frames_of(self, tokens: Tensor) -> Tensor:
        return tokens // self.shape.frame_tokens

    def _turn_to(self, keys: Tensor, unrotated: Tensor, frames: Tensor) -> None:
        """Rotates the time part of keys anew, from the unrotated copy, so that no rounding adds up over a long run."""
        for layer in range(self.shape.layers):
            keys[layer, ..., : self.time_dims] = self._turn(unrotated[layer], frames[layer])

    def _turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        angles = self.rotary.angles(positions, self.time_dims)
        return rotate(keys, torch.stack([angles.cos(), angles.sin()]).float())


def grown(histories: Mapping[Hashable, History], anew: bool, finished: int = 0) -> Grown:
    """What the clean histories of all branches have grown by since the last call, on the CPU.

    Args:
        anew: all of them, whatever was loaded or given out before.
        finished: so many of the oldest active chunks count as clean.
    """
    whole = anew or not all(history.taken for history in histories.values())
    new = {name: history.save(0 if whole else history.taken, finished) for name, history in histories.items()}
    for history in histories.values():
        history.taken = history.clean + finished * history.shape.chunk_tokens
    return Grown(new, whole)


def spared(work: Callable[[], Tensor], histories: Iterable[History]) -> Tensor:
    """Does a part of a forward, and once more with the history in system memory where the device runs out of its own.

    A forward changes nothing until it is done, but its own slot of the history, which it fills again.
    """
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        if not any([history.to_system_memory() for history in histories]):
            raise
    return work()


def _runs_out(work: Callable[[], object]) -> bool:
    """Does the work, or says that the device has no memory for it; then nothing of it is left on the device."""
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return True
    return False


def _gather(part: Tensor, kept: Tensor) -> Tensor:
    """Tokens `kept` [B, heads, keep] of a part [B, heads, tokens] or [B, heads, tokens, D]."""
    index = kept if part.ndim == 3 else kept[..., None].expand(*kept.shape, part.shape[-1])
    return part.gather(2, index)


class ChunkView:
    """One forward of one chunk over its history: writes its keys and values and attends."""

    def __init__(self, history: History, chunk: int, visible: int | None):
        self.history = history
        self.start, self.end = history.slot(chunk)
        self.first, self.last = 0 if history.sees_end(chunk) else history.shape.end_tokens, self.end
        if visible is not None:
            self.first = max(self.first, self.start - visible * history.shape.chunk_tokens)
        if chunk == END:
            self.first, self.last = 0, history.clean
        self.table = history.table(chunk)
        self.asks = history.asks(chunk)
        if self.asks and not history.queries:
            history.queries = [torch.empty(0)] * history.shape.layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFunction) -> Tensor:
        """Unrotated q, k, v [B, heads, chunk tokens, D] to attended values of q's shape."""
        history = self.history
        q = rotate(q, self.table)
        keys, values = history.keys[layer], history.values[layer]
        keys[:, :, self.start : self.end] = rotate(k, self.table)
        values[:, :, self.start : self.end] = v
        if history.unrotated is not None:
            history.unrotated[layer, :, :, self.start : self.end] = k[..., : history.time_dims]
        if self.asks:
            last = history.settings.compression.queries
            history.queries[layer] = q[:, :, -last:].contiguous().to(keys.device)
        seen = (part[:, :, self.first : self.last].to(q.device) for part in (keys, values))
        return attention(q, *seen)
