"""Bounded store of the keys and values that a chunk attends to, for one run and one branch of guidance.

Each layer has a buffer for keys and one for values, laid out as

    [ given end | given lead | clean tokens, in time order | chunk | next chunk | ... ]

Given frames that fill no chunk (a start image, an end image) stay whatever the budget is. An end is clean from the
start and stands at its own place in time, behind everything else.

The chunks of a forward have slots behind the clean tokens. A chunk writes its keys and values into its slot and attends
to everything before the slot's end: the clean history, the older chunks of the forward and itself. That is one piece of
memory, so attention needs neither a mask nor a copy. A finished chunk becomes clean by moving a boundary; when another
one begins and the clean tokens are over budget, they are cut, and which ones stay may differ from head to head.

Where the plan says so, slots lie in one scratch that all layers share: `open_layer` reads a layer's clean tokens into
it, and `close_layer` takes out what has become clean, and cuts the layer at once where it is full.

Where the device has too little memory, by the plan or because it ran out, the front of the buffers is in system memory,
in whole chunks. All computing stays on the device, so that the result is the same to the bit; token numbers and
queries, which are small, stay there.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..schedule import Given, InShot, Rerun, Shot
from ..settings import HistorySettings
from .compression import asking_queries, blended_sink, evict, sink_tokens
from .offload import TOO_LITTLE, OffloadableBuffer, attempts, runs_out_of_memory
from .plan import MemoryPlan
from .positions import Positions
from .quantised import PackedBuffer
from .rolling_sink import Beginning
from .snapshot import Snapshot, SnapshotDelta
from .streams import AT_ONCE, Pending, SideStream

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, heads, tokens, D] -> q's shape
Chunk = int | Given


Span = tuple[Sequence[OffloadableBuffer], int, int]  # of each layer, tokens from one to before another


class Layer(NamedTuple):
    """Keys and values that one layer stores; where positions are relative, keys without their turn in time."""

    keys: OffloadableBuffer
    values: OffloadableBuffer


class History:
    """Keys and values of one branch.

    Args:
        plan: sizes.
        positions: of the run, which all of its branches share.
        settings: budget, compression, where it lives.
        dtype: of the keys.
        keeps_slots: chunks keep their slots, and what is written there, from tick to tick.
        stream: takes copies to and from system memory.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        positions: Positions,
        settings: HistorySettings,
        dtype: torch.dtype,
        keeps_slots: bool = True,
        stream: SideStream = AT_ONCE,
    ):
        network = plan.network
        self.plan, self.settings = plan, settings
        self.dtype, self.device = dtype, positions.device
        self.keeps_slots, self.stream = keeps_slots, stream
        self.positions = positions
        rows = (plan.batch, network.kv_heads)
        # Number of each token in the whole video: frame x tokens a frame + place in the frame.
        self.tokens = torch.zeros(network.layers, *rows, plan.layer_tokens, dtype=torch.int32, device=self.device)
        self.queries: Tensor | None = None  # [layers, B, heads, Q, D] of the chunk that asks at the next cut
        if plan.asking:
            size = (network.layers, plan.batch, network.heads, plan.asking, network.head_dim)
            self.queries = torch.zeros(size, dtype=dtype, device=self.device)
        self.asked = False  # whether they are there yet
        self.scratch = self._scratch() if plan.needs_scratch else None
        self.layers: list[Layer] = []
        most = plan.movable_chunks
        for chunks in range(plan.moved if settings.memory == "auto" else most, most + 1):
            if not runs_out_of_memory(partial(self._allocate, chunks)):
                break
        self.clean = plan.end_tokens  # tokens, those of the end included
        self.has_end = False  # whether the end's tokens are there yet
        self.slots: list[Chunk] = []  # chunks behind the clean tokens, oldest first
        self.follows = 0  # the frame of the video that follows the clean tokens, where positions are relative
        self.storing: list[Chunk] = []  # those of them that become clean with the forward that goes on
        self.shot = -1  # number of the first frame of the shot that the newest chunk is in; -1 in the first shot
        self.saved = 0  # tokens at the front that are loaded or that `begin_delta` gave out; 0 once one is dropped
        # Where it is a dictionary: keys and values of what is attended to, by layer, on the CPU, turned by their place
        # in the video.
        self.captured: dict[int, tuple[Tensor, Tensor]] | None = None
        self._open: Layer | None = None  # the layer that is attended to
        self._unturned: dict[Chunk, Tensor] = {}  # keys of chunks that become clean, without their turn in time
        self._saving: Pending = Pending(None)  # a copy of clean tokens that may not be finished
        self._cut: list[int] = []  # layers that a cut has left to do

    def _allocate(self, chunks_moved: int) -> None:
        network, plan = self.plan.network, self.plan
        front = plan.front_tokens
        moved = [front(count + 1) - front(count) for count in range(chunks_moved)]
        if not self.stream.overlaps:  # memory to copy from beside other work comes in powers of two, hence the pieces
            moved = [front(chunks_moved)] if chunks_moved else []

        def buffer(tokens: int, moved: list[int]) -> OffloadableBuffer:
            size = (plan.batch, network.kv_heads, tokens, network.head_dim)
            if plan.packing is not None:
                return PackedBuffer.room_for(size, moved, plan.packing, self.dtype, self.device, self.stream)
            return OffloadableBuffer.empty(size, moved, self.dtype, self.device, self.stream)

        def apart(tokens: int) -> OffloadableBuffer:
            return buffer(tokens, [tokens] if self.settings.memory == "system" else [])

        self.layers = [Layer(*(buffer(plan.layer_tokens, moved) for _ in range(2))) for _ in range(network.layers)]
        self.beginning = Beginning(plan, apart) if plan.beginning_frames else None

    def _scratch(self) -> Layer:
        plan = self.plan
        size = (plan.batch, plan.network.kv_heads, plan.clean_tokens + plan.slot_tokens, plan.network.head_dim)
        keys, values = (torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(2))
        return Layer(OffloadableBuffer(keys), OffloadableBuffer(values))

    def arrange(self, chunks: Sequence[Chunk], storing: Sequence[Chunk] = ()) -> None:
        """Gives the chunks of a forward their slots.

        Args:
            chunks: of the forward, oldest first.
            storing: those of them that become clean with it.
        """
        self._saving.on_device()
        self._saving = Pending(None)
        self.storing = list(storing)
        numbered: list[Chunk] = [chunk for chunk in chunks if chunk is not Given.END]
        new = [chunk for chunk in numbered if chunk not in self.slots]
        if not self.keeps_slots:
            self.slots = [chunk for chunk in numbered if chunk not in new]
        if self.positions.relative:
            self._follow(new)
        now = new or self.settings.compression.at_once
        if now and self.plan.kind == "stored" and self.clean > self.plan.clean_tokens:
            self._cut_stored()
        for chunk in new:
            if isinstance(chunk, Rerun):
                self.clean, self.saved = self._before(chunk), 0
            elif isinstance(chunk, InShot):
                self.shot = chunk.begins
        self.slots = [*self.slots, *new] if self.keeps_slots else numbered
        for chunk in chunks:
            after = self._frames_done() if chunk is Given.END else self.plan.numbers_of(chunk)[-1] + 1
            self.positions.reach(after)
            if chunk is Given.END or self.plan.kind == "stored":
                start, end = self.slot(chunk)
                self.tokens[:, :, :, start:end] = self._numbers(chunk)

    def _before(self, again: Rerun) -> int:
        """Clean tokens that stay in front of frames that are run once more: the older ones, or of heads that have kept
        more and less of those, only what no cut takes."""
        end, first = self.plan.end_tokens, again.frames[0] * self.plan.frame_tokens
        older = (self.tokens[:, :, :, end : self.clean] < first).sum(dim=3)
        least, most = end + int(older.min()), end + int(older.max())
        return least if least == most else min(least, self.plan.given_tokens + self._sink)

    def slot(self, chunk: Chunk) -> tuple[int, int]:
        """First token and end of a chunk's slot."""
        if chunk is Given.END:
            return 0, self.plan.end_tokens
        before = self.slots[: self.slots.index(chunk)]
        start = self.clean + sum(self.plan.tokens_of(other) for other in before)
        return start, start + self.plan.tokens_of(chunk)

    def open_layer(self, layer: int) -> None:
        """Makes a layer ready to be attended to; read once a forward, where it has to be read at all."""
        stored = self.layers[layer]
        if self.scratch is None and not stored.keys.moved:
            self._open = stored
            return
        # A layer that has moved since it was opened holds what the same forward has written there.
        written = self.keeps_slots or self._open is stored
        self.scratch = self.scratch or self._scratch()
        filled = self.clean + (self._slot_tokens if self.plan.kind == "stored" and written else 0)
        keys, values = (part.here[:, :, :filled] for part in self.scratch)
        if self.positions.relative:
            turned = self.positions.turn(
                stored.keys.read(0, filled),
                self.tokens[layer, :, :, :filled],
                self._frame_after(filled),
                self.plan.end_tokens,
            )
            keys.copy_(turned)
        else:
            stored.keys.copy_to(keys, 0)
        stored.values.copy_to(values, 0)
        self._open = self.scratch
        self._fetch_after(layer)

    def attend(
        self,
        layer: int,
        chunk: Chunk,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention: Attention,
        visible: int | None = None,
        keep_queries: bool = False,
    ) -> Tensor:
        """Stores a chunk's keys and values in the open layer and attends.

        Args:
            chunk: one that `arrange` gave a slot.
            q, k, v: [B, heads, tokens, D], not rotated.
            visible: how many of the chunks before it may be seen; None for all. Needs an uncut history.
            keep_queries: whether its queries are kept for the next cut.

        Returns:
            Attended values of q's shape.
        """
        if self._open is self.layers[layer] and self._open.keys.moved:
            self.open_layer(layer)
        assert self._open is not None
        keys, values = (part.here for part in self._open)
        start, end = self.slot(chunk)
        table = self.positions.table(chunk)
        q = self.positions.rotate(q, table)
        keys[:, :, start:end] = turned = self.positions.rotate(k, table)
        values[:, :, start:end] = v
        self._store(layer, chunk, k, turned, v, start)
        if keep_queries and self.queries is not None:
            self._keep_queries(layer, q)
        if self.captured is not None and chunk == self.slots[0]:
            placed = self.positions.rotate(k, self.positions.absolute_table(chunk))
            self.captured[layer] = placed.cpu(), v.cpu()
        if chunk is Given.END:
            first, end = 0, self.clean
        else:
            first = self._first_seen(chunk)
            if visible is not None:
                first = max(first, start - visible * self.plan.chunk_tokens)
        return attention(q, keys[:, :, first:end], values[:, :, first:end])

    def look(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """Attends as `attend` does, to the open layer and to these keys and values, and stores nothing of them."""
        assert self._open is not None
        table, first, (start, _) = self.positions.table(chunk), self._first_seen(chunk), self.slot(chunk)
        keys, values = (part.here[:, :, first:start] for part in self._open)
        q, k = self.positions.rotate(q, table), self.positions.rotate(k, table)
        return attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2))

    def _first_seen(self, chunk: Chunk) -> int:
        """The first token that a chunk looks at."""
        return 0 if self.has_end and self.positions.sees_end(chunk) else self.plan.end_tokens

    def _store(self, layer: int, chunk: Chunk, k: Tensor, turned: Tensor, v: Tensor, start: int) -> None:
        """Keeps what a later forward needs, where the slot lies in the scratch; k as given, and turned."""
        if self._open is self.layers[layer] or not (chunk in self.storing or self.keeps_slots):
            return
        if self.positions.relative:
            turned = self.positions.rotate(k, self.positions.still_table(chunk))
        if self.plan.kind == "stored" or chunk is Given.END:
            self.layers[layer].keys.write(start, turned)
            self.layers[layer].values.write(start, v)
        elif self.positions.relative:
            self._unturned[chunk] = turned

    def _keep_queries(self, layer: int, q: Tensor) -> None:
        picked = q[:, :, asking_queries(self.settings.compression, q.shape[2])]
        if self.queries is None or self.queries.shape[3] != picked.shape[2]:  # those of a state were fewer or more
            self.queries = picked.new_zeros(self.plan.network.layers, *picked.shape)
        self.queries[layer] = picked
        self.asked = True

    def close_layer(self, layer: int) -> None:
        """Takes what becomes clean with this forward out of the shared scratch, and cuts a layer that is full."""
        chunks = [chunk for chunk in self.storing if chunk is not Given.END]
        if self.plan.kind == "stored" or not chunks:
            return
        assert self._open is not None
        end = self.clean + sum(self.plan.tokens_of(chunk) for chunk in chunks)
        keys, values = (part.here[:, :, self.clean : end] for part in self._open)
        if self.positions.relative:
            keys = torch.cat([self._unturned[chunk] for chunk in chunks], dim=2)
        numbers = torch.cat([self._numbers(chunk) for chunk in chunks]).expand(*keys.shape[:2], -1)
        if end <= self.plan.clean_tokens:
            self._write(layer, self.clean, keys, values, numbers)
            return
        given = self.plan.given_tokens
        seen = self._open.keys.here[:, :, given:end]
        stored = self.layers[layer].keys.read(given, self.clean) if self.positions.relative else seen
        old = torch.cat([stored, keys], dim=2) if self.positions.relative else seen
        whole = self._open.values.here[:, :, given:end]
        tokens = torch.cat([self.tokens[layer, :, :, given : self.clean], numbers], dim=2)
        parts = [old, whole, tokens]
        self._write_kept(layer, parts, self._evicted(layer, seen, parts, self._frame_after(end)))

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Ends a forward: these chunks are clean from now on. One that this branch was never run for has no slot, and
        is not missed."""
        self.storing = []
        self._unturned.clear()
        for chunk in chunks:
            if chunk is Given.END:
                self.has_end = True
            elif chunk in self.slots:
                if self.slots[0] != chunk:
                    raise RuntimeError(f"Chunk {chunk} cannot become clean: the slots are those of {self.slots}.")
                self.slots.pop(0)
                self.clean += self.plan.tokens_of(chunk)
        if self.plan.kind == "shared" and self.clean > self.plan.clean_tokens:
            self.clean, self.saved = self.plan.clean_tokens, 0

    def cut_now(self) -> None:
        """Cuts what is over budget, which otherwise waits for another chunk to begin."""
        if self.plan.kind == "stored" and self.clean > self.plan.clean_tokens:
            if self.positions.relative:
                self._follow()  # the newest clean chunk had a slot when the forward began
            self._cut_stored()

    def _follow(self, new: Sequence[Chunk] = ()) -> None:
        """Notes which frame follows the clean tokens, when these chunks begin."""
        oldest = next(iter([*self.slots, *new]), None)
        self.follows = self._frames_done() if oldest is None else self.plan.first_frame(oldest)

    def _cut_stored(self) -> None:
        """Cuts every layer to the budget and moves the slots up behind the clean tokens.

        Should it end for want of memory, it goes on where it was when it is called again.
        """
        self._cut = self._cut or list(range(len(self.layers)))
        while self._cut:
            for attempt in attempts([self]):
                with attempt:
                    self._cut_layer(self._cut[0])
            self._cut.pop(0)
        self.clean, self.saved = self.plan.clean_tokens, 0

    def _cut_layer(self, layer: int) -> None:
        given, filled = self.plan.given_tokens, self.clean + self._slot_tokens
        parts = [*self.layers[layer], OffloadableBuffer(self.tokens[layer])]
        clean = [part.read(given, self.clean) for part in parts]
        seen = clean[0]
        if self.positions.relative:
            seen = self.positions.turn(clean[0], clean[2], self._frame_after(self.clean))
        fresh = self._evicted(layer, seen, clean, self.follows)
        if self.slots:
            moved = [part.read(self.clean, filled) for part in parts]
            fresh = [torch.cat(pair, dim=2) for pair in zip(fresh, moved, strict=True)]
        self._write_kept(layer, clean, fresh)

    def _write_kept(self, layer: int, clean: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
        """Writes what a cut leaves behind the sink, and the sink where it has changed."""
        settings, sink = self.settings.compression, self._sink
        if settings.moves_sink:
            front = blended_sink(settings, sink, self._keep, clean)
            fresh, sink = [torch.cat(pair, dim=2) for pair in zip(front, fresh, strict=True)], 0
        keys, values, tokens = fresh
        self._write(layer, self.plan.given_tokens + sink, keys, values, tokens)

    def _evicted(
        self, layer: int, seen: Tensor, parts: list[Tensor], after: int, queries: Tensor | None = None
    ) -> list[Tensor]:
        """What stays of a layer's tokens but the given ones and the sink, by the queries that were kept unless told
        others; `after`: the frame that follows them, which a rolling sink asks for."""
        plan = self.plan
        if self.beginning is not None:
            return self.beginning.cut(layer, parts, after)
        if queries is None and self.queries is not None and self.asked:
            queries = self.queries[layer]
        return evict(
            self.settings.compression, seen, parts, queries, self._keep, plan.frame_tokens, plan.chunk_tokens, layer,
            self._stays(parts[2]),
        )  # fmt: skip

    def _stays(self, tokens: Tensor) -> Tensor | None:
        """Which tokens [B, heads, N] are of the frames that a shot began with, as many as the sink has."""
        sink = min(self.settings.compression.sink or 0, self.plan.chunk_frames)
        if self.shot < 0 or not sink:
            return None
        frames = self.positions.frames(tokens)
        return (frames >= self.shot) & (frames < self.shot + sink)

    @property
    def _keep(self) -> int:
        """Tokens that stay at a cut, given ones apart."""
        return self.plan.clean_tokens - self.plan.given_tokens

    @property
    def _sink(self) -> int:
        return sink_tokens(self.settings.compression, self._keep, self.plan.frame_tokens, self.plan.chunk_tokens)

    def _write(self, layer: int, start: int, keys: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Changes stored tokens; everything that needs memory is made before the first of them is changed."""
        changes = [
            *self.layers[layer].keys.changes(start, keys),
            *self.layers[layer].values.changes(start, values),
            (self.tokens[layer, :, :, start : start + tokens.shape[2]], tokens),
        ]
        for old, new in changes:
            old.copy_(new)

    def _numbers(self, chunk: Chunk) -> Tensor:
        """Numbers of a chunk's tokens in the video."""
        frames = self.plan.numbers_of(chunk)
        if frames[-1] - frames[0] == len(frames) - 1:
            first, after = frames[0] * self.plan.frame_tokens, (frames[-1] + 1) * self.plan.frame_tokens
            return torch.arange(first, after, device=self.device, dtype=torch.int32)
        inside = torch.arange(self.plan.frame_tokens, device=self.device, dtype=torch.int32)
        starts = torch.tensor(frames, device=self.device, dtype=torch.int32) * self.plan.frame_tokens
        return (starts[:, None] + inside).flatten()

    def _frame_after(self, filled: int) -> int:
        """The frame of the video that follows so many filled tokens: the clean ones, or those of slots too."""
        return self.follows + (filled - self.clean) // self.plan.frame_tokens

    def _frames_done(self) -> int:
        if self.clean == self.plan.end_tokens:
            return 0
        return int(self.positions.frames(self.tokens[:, :, :, self.clean - 1]).max()) + 1

    @property
    def _slot_tokens(self) -> int:
        return sum(self.plan.tokens_of(chunk) for chunk in self.slots)

    @property
    def bytes(self) -> int:
        """Of all buffers."""
        layers = [part for layer in (*self.layers, *([self.scratch] if self.scratch else [])) for part in layer]
        queries = 0 if self.queries is None else self.queries.nbytes
        beginning = 0 if self.beginning is None else self.beginning.nbytes
        return sum(part.nbytes for part in layers) + self.tokens.nbytes + queries + beginning

    @property
    def bytes_used(self) -> int:
        """Of all buffers, without the room for tokens that are not there yet."""
        room = sum(part.nbytes for layer in self.layers for part in layer) + self.tokens.nbytes
        filled = self.clean + (self._slot_tokens if self.plan.kind == "stored" else 0)
        return self.bytes - room + room * filled // self.plan.layer_tokens

    @property
    def on_device(self) -> bool:
        """Whether some of it may still be moved."""
        return any(part.here.shape[2] for layer in self.layers for part in layer)

    @property
    def chunks_moved(self) -> int:
        """Chunks that are in system memory because the device has too little of its own."""
        return self._chunks_away() if self.settings.memory == "auto" else 0

    def move_chunk(self) -> None:
        """Makes room on the device that computes: the oldest chunk there moves to system memory."""
        self._saving.on_cpu()  # or what it copies would not be free
        away = self._chunks_away()
        count = self.plan.front_tokens(away + 1) - self.plan.front_tokens(away)
        for layer in self.layers:
            for part in layer:
                part.move(count)

    def _chunks_away(self) -> int:
        """Chunks in system memory, of the layer that has most there."""
        tokens = max(part.tokens_moved for layer in self.layers for part in layer)
        return max(0, tokens - self.plan.given_tokens) // self.plan.chunk_tokens

    def _fetch_after(self, layer: int) -> None:
        """Begins to bring back what the next layer keeps in system memory, while this one computes.

        Where a lack of memory has moved everything, there is none to spare for that.
        """
        if not self.stream.overlaps or not self.layers[layer].keys.moved:
            return
        if self.on_device or self.settings.memory == "system":
            count = len(self.layers) // self.plan.network.stacks
            first = layer - layer % count
            if layer == first:  # another network's layers may have been run last
                for other in (*self.layers[:first], *self.layers[first + count :]):
                    other.keys.forget()
                    other.values.forget()
            before, after = (self.layers[first + (layer - first + way) % count] for way in (-1, 1))
            after.keys.fetch(self.clean, before.keys)
            after.values.fetch(self.clean, before.values)

    def save(self, first: int = 0) -> Snapshot:
        """Copies the clean history from token `first` on to the CPU."""
        return self._turned(Pending(self._copied(first, AT_ONCE)))

    def begin_save(self, first: int = 0) -> Callable[[], Snapshot]:
        """Begins what `save` does; what it gives waits for the copy. The run may go on meanwhile."""
        buffers = [part.here for layer in self.layers for part in layer]
        queries = [] if self.queries is None else [self.queries]
        self._saving = self.stream.run(partial(self._copied, first, self.stream), [*buffers, self.tokens, *queries])
        return partial(self._turned, self._saving)

    def _copied(self, first: int, stream: SideStream) -> Snapshot:
        """The clean history on the CPU, keys as they are stored."""
        start, end = max(first, self.plan.end_tokens), self.clean
        keys, values = zip(*self.layers, strict=True)
        tokens = [OffloadableBuffer(each) for each in self.tokens]
        spans: list[list[Span]] = [[(parts, start, end)] for parts in (keys, values, tokens)]
        if self.beginning is not None and self.beginning.after is not None:
            spans = self._spans_of_beginning(self.beginning, (keys, values, tokens))
        whole, copied, numbers = (_stacked(each, stream) for each in spans)
        if self.queries is None or not self.asked:
            return Snapshot(whole, copied, numbers, whole.new_empty(0))
        queries = stream.cpu_like(self.queries, self.queries.shape)
        return Snapshot(whole, copied, numbers, queries.copy_(self.queries, non_blocking=stream.overlaps))

    def _spans_of_beginning(
        self, beginning: Beginning, parts: Sequence[Sequence[OffloadableBuffer]]
    ) -> list[list[Span]]:
        """What a rolling sink goes on from: given frames, the beginning and the newest chunk. The window's other tokens
        are made of these."""
        given, newest = (self.plan.end_tokens, self.plan.given_tokens), self.clean - self.plan.chunk_tokens
        numbers = [OffloadableBuffer(each) for each in beginning.numbers(self.tokens)]
        first = [*zip(*beginning.layers, strict=True), numbers]
        return [
            [(now, *given), (then, 0, beginning.tokens), (now, newest, self.clean)]
            for now, then in zip(parts, first, strict=True)
        ]

    @torch.inference_mode()
    def _turned(self, copied: Pending[Snapshot]) -> Snapshot:
        """Keys rotated by their place in the video, not in the window."""
        saved = copied.on_cpu()
        if not self.positions.relative:
            return saved
        turned = [self.positions.turn_absolute(*layer) for layer in zip(saved.keys, saved.tokens, strict=True)]
        return saved._replace(keys=torch.stack(turned))

    def load(self, saved: Snapshot) -> None:
        """Takes over the clean history of an earlier run, lead included, cut to this run's budget where it is larger.

        Raises:
            UserError: the history is of another model, size or batch, or too long for this run's room.
        """
        plan, network, count = self.plan, self.plan.network, saved.keys.shape[3]
        expected = (network.layers, plan.batch, network.kv_heads, count, network.head_dim)
        if tuple(saved.keys.shape) != expected:
            raise UserError(
                f"The state's history has shape {tuple(saved.keys.shape)}, this run needs {expected} "
                "[layers, batch, heads, tokens, head width]: the state is of another model, size or batch."
            )
        lead = plan.given_tokens - plan.end_tokens
        keep = self.settings.kept_frames(plan.chunk_frames)
        kept = count if keep is None else min(count, lead + keep * plan.frame_tokens)
        if kept > plan.clean_tokens - plan.end_tokens:
            raise UserError(
                f"The state holds {kept} tokens of history, and there is room for "
                f"{plan.clean_tokens - plan.end_tokens}."
            )
        for layer in range(network.layers):
            for attempt in attempts([self]):
                with attempt:
                    self._load_layer(layer, saved, kept)
        self.clean = plan.end_tokens + kept
        self.saved = 0 if kept < count else self.clean

    def _load_layer(self, layer: int, saved: Snapshot, kept: int) -> None:
        parts = [part[layer] for part in saved[:3]]
        if kept < parts[0].shape[2]:
            lead = self.plan.given_tokens - self.plan.end_tokens
            rest = [part[:, :, lead:] for part in parts]
            if self.beginning is not None:
                self._load_rolling(layer, [part[:, :, :lead] for part in parts], rest)
                return
            queries = saved.queries[layer] if len(saved.queries) else None
            cut = self._evicted(layer, rest[0], rest, 0, queries)
            sink = [part[:, :, : self._sink] for part in rest]
            if self.settings.compression.moves_sink:
                sink = self._loaded_sink(rest, kept - lead)
            joined = zip(parts, sink, cut, strict=True)
            parts = [torch.cat([part[:, :, :lead], front, new], dim=2) for part, front, new in joined]
        keys, values, tokens = parts[0], parts[1], parts[2].to(self.device)
        if self.positions.relative:
            keys = self._unplaced(keys, tokens)
        self._write(layer, self.plan.end_tokens, keys, values, tokens)
        if len(saved.queries) and self.plan.asking:
            queries = saved.queries[layer]
            self._keep_queries(layer, queries.to(self.device, self.dtype))

    def _load_rolling(self, layer: int, lead: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Takes over given frames, and of the others the first ones and the newest chunk."""
        assert self.beginning is not None
        lead_keys, keys = (self._unplaced(each[0], each[2]) for each in (lead, parts))
        after = int(parts[2][0, 0, -1]) // self.plan.frame_tokens + 1
        kept = self.beginning.cut(layer, [keys, parts[1].to(self.device), parts[2].to(self.device)], after)
        first = [lead_keys, lead[1].to(self.device), lead[2].to(self.device)]
        keys, values, tokens = (torch.cat(pair, dim=2) for pair in zip(first, kept, strict=True))
        self._write(layer, self.plan.end_tokens, keys, values, tokens)

    def _unplaced(self, keys: Tensor, tokens: Tensor) -> Tensor:
        """Saved keys without their turn in time."""
        return self.positions.turn_back(keys.to(self.device, self.dtype), tokens.to(self.device))

    def _loaded_sink(self, parts: Sequence[Tensor], keep: int) -> list[Tensor]:
        """The sink of a state that is cut as it is loaded, whose keys stand where they do in the video."""
        keys, values, tokens = parts
        unturned = [self.positions.turn_back(keys, tokens), values, tokens]
        keys, values, tokens = blended_sink(self.settings.compression, self._sink, keep, unturned)
        return [self.positions.turn_absolute(keys, tokens), values, tokens]


def _stacked(spans: Sequence[Span], stream: SideStream) -> Tensor:
    """Tokens of all layers, one span after another, on the CPU: [layers, B, heads, tokens, ...]."""
    alike = spans[0][0][0].read(0, 0)
    batch, heads, _, *rest = alike.shape
    count = sum(end - start for _, start, end in spans)
    whole = stream.cpu_like(alike, (len(spans[0][0]), batch, heads, count, *rest))
    filled = 0
    for parts, start, end in spans:
        for copy, part in zip(whole, parts, strict=True):
            part.copy_to(copy[:, :, filled : filled + end - start], start, waits=not stream.overlaps)
        filled += end - start
    return whole


def begin_delta(
    histories: Mapping[Hashable, History], full: bool, shown: str = "", shot: Shot = Shot()
) -> Callable[[], SnapshotDelta]:
    """Begins to copy what the clean histories of all branches have grown by since the last call to the CPU; what it
    gives waits for the copies.

    Args:
        full: all of them, whatever was loaded or given out before.
        shown: stands for the texts that they were computed for.
        shot: that the newest chunk is in.
    """
    full = full or not all(history.saved for history in histories.values())
    copies = {name: history.begin_save(0 if full else history.saved) for name, history in histories.items()}
    for history in histories.values():
        history.saved = history.clean
    return lambda: SnapshotDelta({name: copy() for name, copy in copies.items()}, full, shown, shot)


def moved_note(histories: Collection[History]) -> str:
    """Says for the report what is not on the device for want of memory there; nothing while all is."""
    most = max(histories, key=lambda history: history.chunks_moved, default=None)
    if most is None or not most.chunks_moved:
        return ""
    return (
        f"{TOO_LITTLE}: {most.chunks_moved} of {most.plan.movable_chunks} chunks of history are in system memory, "
        "oldest first, which is slower; a history budget makes it smaller"
    )
