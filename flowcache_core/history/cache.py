"""Bounded store of the keys and values that a chunk attends to, for one run and one branch of guidance.

Each layer has a buffer for keys and one for values, laid out as

    [ given end | given lead | clean tokens, in time order | active chunk | next active chunk | ... ]

Given frames that fill no chunk (a start image, an end image) stay whatever the budget is. An end is clean from the
start and stands at its own place in time, behind everything else.

A chunk writes its keys and values into its slot and attends to everything before the slot's end: the clean history,
the active chunks before it and itself. That is one stretch of memory, so attention needs neither a mask nor a copy. A
finished chunk becomes clean by moving a boundary. When the next chunk needs room, the clean tokens are cut to the
budget; the tokens that stay may differ from head to head.

Where the device runs out of memory, the front of the buffers moves to system memory, a chunk at a time. All computing
stays on the device, so that the result is the same to the bit; token numbers and queries, which are small, stay there.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..models.rotary import rotate
from ..schedule import END, LEAD
from .chunk_view import ChunkView
from .compression import TILE_BYTES
from .offload import OUT_OF_MEMORY, SYSTEM, Stretch, runs_out, spared
from .settings import HistorySettings, HistoryShape
from .snapshot import Clean, Grown, choose_tokens, cut_to, gather
from .streams import AT_ONCE, Pending, SideStream


class Layer(NamedTuple):
    """What one layer keeps of every token: key, value, and the part of the key that time rotates, before it was."""

    keys: Stretch
    values: Stretch
    unrotated: Stretch | None

    @property
    def parts(self) -> list[Stretch]:
        return [part for part in self if part is not None]


class Cut(NamedTuple):
    """A piece of work that is left of a cut: some heads of a layer, and the query heads that share them."""

    layer: int
    heads: slice
    query_heads: slice


class History:
    """Keys and values of one branch.

    Args:
        shape: sizes.
        rotary: gives the rotary table of a run of frames.
        settings: budget, compression, positions.
        dtype, device: of the keys; whatever the chunk has.
        side: takes copies to and from system memory.
    """

    def __init__(
        self,
        shape: HistoryShape,
        rotary,
        settings: HistorySettings,
        dtype: torch.dtype,
        device: torch.device,
        side: SideStream = AT_ONCE,
    ):
        self.shape = shape
        self.rotary = rotary
        self.settings = settings
        self.device = device  # that computes
        self.side = side
        self.dtype = dtype
        self.time_dims = rotary.parts[0] if settings.relative else 0
        # Number of each token in the whole video: frame x tokens a frame + place in the frame.
        self.tokens = torch.zeros(
            shape.layers, shape.batch, shape.heads, shape.tokens, dtype=torch.int32, device=device
        )
        self.layers: list[Layer] = []
        for chunks in range(0 if settings.memory == "auto" else shape.capacity, shape.capacity + 1):
            if not runs_out(partial(self._allocate, chunks)):
                break
        self.queries: list[Tensor] = []  # a layer: of the chunk that asks at the next compression
        self._tables: dict[int, Tensor] = {}  # rotary table of each active chunk
        self._saving: Pending = Pending(None)  # a copy of clean tokens that may not be finished
        self._cuts: list[Cut] = []  # that a cut which ran out of memory has left to do
        self.clean = shape.end_tokens  # tokens, those of the end included
        self.has_end = False  # whether the end's tokens are there yet
        self.active: list[int] = []  # chunk numbers, oldest first, each with a slot behind the clean tokens
        self.shift = 0  # frames by which positions are moved towards zero
        self.taken = 0  # tokens at the front that are loaded or that `grown` has given out; 0 once one is dropped

    def _allocate(self, chunks_moved: int) -> None:
        shape = self.shape
        moved = [self._front(count + 1) - self._front(count) for count in range(chunks_moved)]
        if not self.side.overlaps:  # memory to copy from beside other work comes in powers of two, hence the pieces
            moved = [self._front(chunks_moved)] if chunks_moved else []

        def stretch(width: int) -> Stretch:
            size = (shape.batch, shape.heads, shape.tokens, width)
            return Stretch.empty(size, moved, self.dtype, self.device, self.side)

        self.layers = []
        for _ in range(shape.layers):
            unrotated = stretch(self.time_dims) if self.time_dims else None
            self.layers.append(Layer(stretch(shape.head_dim), stretch(shape.head_dim), unrotated))

    def _front(self, chunks: int) -> int:
        """Tokens of so many chunks at the front, and of the given frames before them."""
        return self.shape.given_tokens + chunks * self.shape.chunk_tokens if chunks else 0

    def move_chunk(self) -> None:
        """Makes room on the device that computes: the oldest chunk there moves to system memory."""
        self._saving.on_host()  # or what it copies would not be free
        count = self._front(self._chunks_away() + 1) - self._front(self._chunks_away())
        for layer in self.layers:
            for part in layer.parts:
                part.move(count)
        self.queries = [query.to(self.queries_at) for query in self.queries]

    def _chunks_away(self) -> int:
        """Chunks in system memory, of the layer that has most there."""
        tokens = max(part.tokens_moved for layer in self.layers for part in layer.parts)
        return max(0, tokens - self.shape.given_tokens) // self.shape.chunk_tokens

    def fetch_after(self, layer: int) -> None:
        """Begins to bring back what the next layer keeps in system memory, while this one computes.

        Where a lack of memory has moved everything, there is none to spare for that.
        """
        if not self.side.overlaps or not self.layers[layer].keys.moved:
            return
        if self.on_device or self.settings.memory == "system":
            before, after = self.layers[layer - 1], self.layers[(layer + 1) % len(self.layers)]
            after.keys.fetch(self.clean, before.keys)
            after.values.fetch(self.clean, before.values)

    @property
    def on_device(self) -> bool:
        """Whether some of it may still be moved."""
        return any(part.here.shape[2] for layer in self.layers for part in layer.parts)

    @property
    def chunks_moved(self) -> int:
        """Chunks that are in system memory because the device ran out of its own."""
        return self._chunks_away() if self.settings.memory == "auto" else 0

    @property
    def queries_at(self) -> torch.device:
        """Where queries are kept: on the device as long as anything is."""
        return self.device if self.on_device else SYSTEM

    @property
    def bytes(self) -> int:
        """Of the buffers, and of the queries that are kept for the next cut."""
        buffers = (part.nbytes for layer in self.layers for part in layer.parts)
        return sum(buffers) + self.tokens.nbytes + sum(query.nbytes for query in self.queries)

    @property
    def bytes_used(self) -> int:
        """Of the buffers, what clean and active chunks take up now."""
        return self.bytes * self._filled // self.shape.tokens

    @property
    def _filled(self) -> int:
        """Tokens of clean and active chunks."""
        return self.clean + len(self.active) * self.shape.chunk_tokens

    def open(self, chunk: int) -> None:
        """Gives a chunk a slot; the clean history is cut first where there is no room."""
        self._saving.on_device()
        self._saving = Pending(None)
        if chunk >= 0:
            self._make_room()
        if self.settings.relative:
            after = self.first_frame(chunk) + self.frames(chunk) if chunk != END else self._frames_done()
            self._move_positions(max(0, after - self.shape.given.lead - self.window))
        first, count = (of(chunk) * self.shape.frame_tokens for of in (self.first_frame, self.frames))
        numbers = torch.arange(first, first + count, device=self.device)
        if chunk != END:
            self.active.append(chunk)
        start, end = self.slot(chunk)
        self.tokens[:, :, :, start:end] = numbers

    def _make_room(self) -> None:
        room = self.shape.tokens - self._filled
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

    def view(self, chunk: int, visible: int | None = None) -> ChunkView:
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
            first = self.first_frame(chunk) - self.shift - (self._beyond(self.shift) if chunk == END else 0)
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
        return self._turned(Pending(self._copied(first, finished, AT_ONCE)))

    def begin_save(self, first: int = 0, finished: int = 0) -> Callable[[], Clean]:
        """Begins what `save` does; what it gives waits for the copy. The run may go on meanwhile."""
        buffers = [part.here for layer in self.layers for part in layer.parts]
        self._saving = self.side.run(
            partial(self._copied, first, finished, self.side), [*buffers, self.tokens, *self.queries]
        )
        if finished:  # clean tokens stay as they are up to `open`, an active chunk's only up to the next forward
            self._saving.on_device()
        return partial(self._turned, self._saving)

    def _copied(self, first: int, finished: int, side: SideStream) -> tuple[Clean, Tensor | None]:
        """The clean history on the CPU, and what of its keys time has not rotated."""
        start, end = max(first, self.shape.end_tokens), self.clean + finished * self.shape.chunk_tokens
        keys, values, unrotated = zip(*self.layers, strict=True)
        tokens = [Stretch(each) for each in self.tokens]
        whole, copied, numbers = (_stacked(parts, start, end, side) for parts in (keys, values, tokens))
        queries = whole.new_empty(0)
        if self.queries:
            asked = [Stretch(query) for query in self.queries]
            queries = _stacked(asked, 0, self.queries[0].shape[2], side)
        return Clean(whole, copied, numbers, queries), _stacked(unrotated, start, end, side) if self.time_dims else None

    @torch.inference_mode()
    def _turned(self, copied: Pending[tuple[Clean, Tensor | None]]) -> Clean:
        """Keys rotated by their place in the video, not in the window."""
        clean, unrotated = copied.on_host()
        if unrotated is not None:
            for keys, part, frames in zip(clean.keys, unrotated, self._frames_of(clean.tokens), strict=True):
                keys[..., : self.time_dims] = self._turn(part, frames)
        return clean

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
            saved = cut_to(keep - lead, saved, lead, self.settings, self.shape)
            count = keep
        if count > self.shape.tokens - end:
            raise UserError(
                f"The state holds {count} tokens of history, and there is room for {self.shape.tokens - end}."
            )
        spared(partial(self._fill, saved), [self])
        self.clean = end + count
        self.taken = 0 if cut else self.clean

    def _fill(self, saved: Clean) -> None:
        start, count = self.shape.end_tokens, saved.keys.shape[3]
        self.tokens[:, :, :, start : start + count].copy_(saved.tokens)
        self.queries = [query.to(self.queries_at, self.dtype) for query in saved.queries]
        for layer, keys, values, tokens in zip(self.layers, saved.keys, saved.values, self.tokens, strict=True):
            layer.keys.write(start, keys)
            layer.values.write(start, values)
            if layer.unrotated is not None:
                turned = layer.keys.read(start, start + count)[..., : self.time_dims]
                layer.unrotated.write(start, self._turn(turned, -self._frames_of(tokens[:, :, start : start + count])))

    def _compress(self, keep: int) -> None:
        """Cuts the clean tokens that are not given to `keep` and moves the active chunks up behind them.

        Done piece by piece; should it end for want of memory, it goes on where it was when it is called again.
        """
        given = self.shape.given_tokens
        if self.clean - given <= keep:
            raise RuntimeError(
                f"The history is full with {self.clean} clean tokens, and {given + keep} of them must stay."
            )
        self._cuts = self._cuts or self._all_cuts()
        while self._cuts:
            spared(partial(self._compress_heads, self._cuts[0], keep), [self])
            self._cuts.pop(0)
        self.clean = given + keep
        self.taken = 0

    def _all_cuts(self) -> list[Cut]:
        """For every layer its heads, in groups small enough to be scored at once."""
        shape = self.shape
        size = max(1, TILE_BYTES // (4 * shape.batch * self.clean * shape.head_dim))
        share = self.queries[0].shape[1] // shape.heads if self.queries else 1
        groups = [(slice(at, at + size), slice(at * share, (at + size) * share)) for at in range(0, shape.heads, size)]
        return [Cut(layer, *heads) for layer in range(shape.layers) for heads in groups]

    def _compress_heads(self, cut: Cut, keep: int) -> None:
        """All new tensors are made before the first buffer is changed: nothing is half done where memory runs out."""
        given, layer = self.shape.given_tokens, self.layers[cut.layer]
        asked = self.queries[cut.layer][:, cut.query_heads].to(self.device) if self.queries else None
        keys = layer.keys.read(given, self.clean, cut.heads)
        kept = choose_tokens(self.settings, self.shape, keys, asked, keep, cut.layer)
        changes = []
        for part in (*layer.parts, Stretch(self.tokens[cut.layer])):
            clean = gather(part.read(given, self.clean, cut.heads), kept)
            fresh = torch.cat([clean, part.read(self.clean, self._filled, cut.heads)], dim=2)
            changes += part.changes(given, fresh, cut.heads)
        for old, new in changes:
            old.copy_(new)

    def _move_positions(self, shift: int) -> None:
        """Counts positions from frame `shift` on; tokens from before it that were kept are placed at zero."""
        if shift == self.shift or not self.time_dims:
            return
        spared(partial(self._place_all, shift), [self])
        self.shift = shift
        self._tables.clear()

    def _place_all(self, shift: int) -> None:
        """Rotates the time part of all keys to their positions, anew from the unrotated copy, so that no rounding adds
        up over a long run."""
        for layer, tokens in zip(self.layers, self.tokens, strict=True):
            frames = (self._frames_of(tokens[:, :, : self._filled]) - shift).clamp(min=0)
            frames[:, :, : self.shape.end_tokens] -= self._beyond(shift)
            assert layer.unrotated is not None
            layer.keys.write(0, self._turn(layer.unrotated.read(0, self._filled), frames))

    def _beyond(self, shift: int) -> int:
        """Frames by which a given end is drawn nearer, so that it stands right behind the window at the farthest."""
        given = self.shape.given
        return max(0, given.end_at - shift - self.window - given.lead) if self.settings.relative else 0

    def _frames_of(self, tokens: Tensor) -> Tensor:
        return tokens // self.shape.frame_tokens

    def _turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        angles = self.rotary.angles(positions, self.time_dims)
        return rotate(keys, torch.stack([angles.cos(), angles.sin()]).float())


def _stacked(parts: Sequence[Stretch], start: int, end: int, side: SideStream) -> Tensor:
    """Tokens start to end of all layers, on the CPU: [layers, B, heads, tokens, ...]."""
    batch, heads, _, *rest = parts[0].here.shape
    whole = side.on_host_like(parts[0].here, (len(parts), batch, heads, end - start, *rest))
    for copy, part in zip(whole, parts, strict=True):
        part.copy_to(copy, start, waits=not side.overlaps)
    return whole


def grown(histories: Mapping[Hashable, History], anew: bool, finished: int = 0) -> Callable[[], Grown]:
    """Begins to copy what the clean histories of all branches have grown by since the last call to the CPU; what it
    gives waits for the copies.

    Args:
        anew: all of them, whatever was loaded or given out before.
        finished: so many of the oldest active chunks count as clean.
    """
    whole = anew or not all(history.taken for history in histories.values())
    copies = {name: history.begin_save(0 if whole else history.taken, finished) for name, history in histories.items()}
    for history in histories.values():
        history.taken = history.clean + finished * history.shape.chunk_tokens
    return lambda: Grown({name: copy() for name, copy in copies.items()}, whole)


def moved_note(histories: Collection[History]) -> str:
    """A line for the report on what moved because the device ran out of memory; empty while nothing has."""
    most = max(histories, key=lambda history: history.chunks_moved, default=None)
    if most is None or not most.chunks_moved:
        return ""
    return (
        f"{OUT_OF_MEMORY}: {most.chunks_moved} of {most.shape.capacity} chunks of history were moved to system memory, "
        "oldest first, which is slower; a history budget makes it smaller"
    )
