"""How much memory a run takes, worked out before it begins; nothing else adds sizes up.

Clean history has room in every layer. Keys and values of active chunks are needed by younger chunks of the same tick
and layer only, as long as all active chunks recompute on the same ticks: then one scratch serves all layers.
"""

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import UserError
from ..reuse.policies import Policy, aligned
from ..schedule import ChunkSchedule, Given, InShot, Rerun
from ..settings import Settings
from .compression import asking_queries
from .quantised import Packing, packing_of

Slots = Literal["shared", "stored"]


@dataclass(frozen=True)
class NetworkSizes:
    """What of a network decides how much memory its run takes.

    Attributes:
        layers, heads, kv_heads, head_dim: blocks; query heads, key and value heads, width of each.
        dim: width of the tokens.
        inside: numbers that a token needs inside a block, where it needs most.
        text_width: numbers that a token of text needs in all layers.
        text_tokens: of a text.
        stacks: networks that the layers are of, as many of each; a step runs those of one.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    inside: int
    text_width: int = 0
    text_tokens: int = 0
    stacks: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a run's memory.

    Attributes:
        network: its sizes.
        batch: videos at once; branches of guidance come on top.
        branches: of guidance.
        itemsize: bytes of a number that is computed with.
        grid: rows and columns of tokens of a frame.
        chunk_frames: latent frames of a chunk.
        lead, end: given frames that fill no chunk, before the first one and after the last.
        total_chunks: of the whole video.
        last_frames: of the last chunk.
        clean_frames: that there is room for in every layer, given ones that fill no chunk apart.
        max_active: chunks that are ever active at once.
        slots: chunks beside the clean ones that there is room for.
        kind: "shared": in one scratch for all layers; "stored": in every layer.
        asking: queries that are kept for the next cut, a layer and head.
        relative: positions count from the start of the window.
        together: tokens that go through a product at once, at most.
        texts: different ones that are kept at once, for each branch.
        away: all of it lives in system memory.
        moved: so many chunks of each branch do so from the start, the oldest, with the given frames before them.
        packing: of clean keys and values that are stored in fewer bits.
        beginning_frames: of the video, that are kept beside the window (`history.rolling_sink`).
        rerun: finished frames that may be run once more, together.
    """

    network: NetworkSizes
    batch: int
    branches: int
    itemsize: int
    grid: tuple[int, int]
    chunk_frames: int
    lead: int
    end: int
    total_chunks: int
    last_frames: int
    clean_frames: int
    max_active: int
    slots: int
    kind: Slots
    asking: int
    relative: bool
    together: int
    texts: int = 1
    away: bool = False
    moved: int = 0
    packing: Packing | None = None
    beginning_frames: int = 0
    rerun: int = 0

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def chunk_tokens(self) -> int:
        return self.frame_tokens * self.chunk_frames

    @property
    def end_tokens(self) -> int:
        return self.frame_tokens * self.end

    @property
    def given_tokens(self) -> int:
        return self.end_tokens + self.frame_tokens * self.lead

    @property
    def clean_tokens(self) -> int:
        """Tokens that a layer's clean history may hold, given frames included."""
        return self.given_tokens + self.frame_tokens * self.clean_frames

    @property
    def beginning_tokens(self) -> int:
        return self.frame_tokens * self.beginning_frames

    @property
    def clean_chunks(self) -> int:
        """Chunks that these frames are of, the last one perhaps in part."""
        return -(-self.clean_frames // self.chunk_frames)

    @property
    def slot_tokens(self) -> int:
        return self.chunk_tokens * self.slots

    @property
    def layer_tokens(self) -> int:
        """Tokens that every layer has room for."""
        return self.clean_tokens + (self.slot_tokens if self.kind == "stored" else 0)

    @property
    def needs_scratch(self) -> bool:
        """Whether a layer is read into a scratch before it is attended to."""
        return self.kind == "shared" or self.relative or self.away or self.moved > 0

    @property
    def movable_chunks(self) -> int:
        """Chunks of a branch that can be in system memory: the clean ones, and active ones that every layer stores."""
        return self.clean_chunks + (self.slots if self.kind == "stored" else 0)

    def front_tokens(self, chunks: int) -> int:
        """Tokens of so many chunks at the front, and of the given frames before them."""
        return min(self.layer_tokens, self.given_tokens + chunks * self.chunk_tokens) if chunks else 0

    def tokens_of(self, chunk: int | Given) -> int:
        return self.frame_tokens * self.frames_of(chunk)

    def frames_of(self, chunk: int | Given) -> int:
        if isinstance(chunk, Rerun):
            return len(chunk.frames)
        if isinstance(chunk, Given):
            return {Given.LEAD: self.lead, Given.END: self.end}[chunk]
        return self.last_frames if chunk == self.total_chunks - 1 else self.chunk_frames

    def first_frame(self, chunk: int | Given) -> int:
        """Number in the video of a chunk's first frame."""
        if isinstance(chunk, Rerun):
            return chunk.frames[0]
        if chunk is Given.LEAD:
            return 0
        if chunk is Given.END:
            return self.lead + self.chunk_frames * (self.total_chunks - 1) + self.last_frames
        return self.lead + self.chunk_frames * chunk + (chunk.moved if isinstance(chunk, InShot) else 0)

    def numbers_of(self, chunk: int | Given) -> tuple[int, ...]:
        """Numbers in the video of a chunk's frames."""
        if isinstance(chunk, Rerun):
            return chunk.frames
        first = self.first_frame(chunk)
        return tuple(range(first, first + self.frames_of(chunk)))

    @property
    def token_bytes(self) -> int:
        """Of a token's key and value in one layer and branch, as they are computed."""
        return 2 * self.batch * self.network.kv_heads * self.network.head_dim * self.itemsize

    @property
    def stored_token_bytes(self) -> int:
        """The same, as they are stored, and the token's number."""
        rows = self.batch * self.network.kv_heads
        kept = self.token_bytes if self.packing is None else 2 * rows * self.packing.bytes
        return kept + self.number_bytes

    @property
    def number_bytes(self) -> int:
        """Of a token's number in one layer and branch; it always lies on the device."""
        return 4 * self.batch * self.network.kv_heads

    @property
    def stored_bytes(self) -> int:
        """Of the keys and values, and the token numbers, that all layers and branches store."""
        beginning = self.beginning_tokens * (self.stored_token_bytes - self.number_bytes)
        return self.branches * self.network.layers * (self.layer_tokens * self.stored_token_bytes + beginning)

    @property
    def scratch_bytes(self) -> int:
        """Of the scratch that all layers share."""
        if not self.needs_scratch:
            return 0
        return self.branches * (self.clean_tokens + self.slot_tokens) * self.token_bytes

    @property
    def query_bytes(self) -> int:
        """Of the queries that are kept for the next cut."""
        rows = self.branches * self.network.layers * self.batch * self.network.heads
        return rows * self.asking * self.network.head_dim * self.itemsize

    @property
    def history_bytes(self) -> int:
        """Of everything that is allocated for keys, values and queries."""
        return self.stored_bytes + self.scratch_bytes + self.query_bytes

    @property
    def unbounded_bytes(self) -> int:
        """Of the history of the same run without a budget."""
        frames = self.total_chunks * self.chunk_frames
        whole = replace(self, clean_frames=frames, slots=0, kind="stored", asking=0)
        return replace(whole, relative=False, away=False, moved=0, packing=None, beginning_frames=0).history_bytes

    @property
    def activation_bytes(self) -> int:
        """What a tick's activations take at their peak: the hidden states of all its chunks, and what the tokens of one
        product need inside a block; at most 15% above what the meter counts (`lab.meter`)."""
        network, rows = self.network, self.branches * self.batch
        rerun = self.rerun * self.frame_tokens
        at_once = max(self.chunk_tokens, self.together // max(1, rows), rerun)
        active = max(self.max_active * self.chunk_tokens, rerun)
        return rows * self.itemsize * (active * network.dim + min(at_once, active) * network.inside)

    @property
    def context_bytes(self) -> int:
        """Of texts' keys and values."""
        numbers = self.network.text_width * self.network.text_tokens
        return self.texts * self.branches * self.batch * numbers * self.itemsize

    @property
    def tables(self) -> int:
        """Rotary tables that are kept at once: of the active chunks, of one that becomes clean, of given frames."""
        return self.max_active + 2

    @property
    def table_bytes(self) -> int:
        """Of those, as matrices of float32."""
        tokens = self.tables * self.chunk_tokens + self.rerun * self.frame_tokens
        return 4 * tokens * self.network.head_dim // 2 * 4

    @property
    def device_bytes(self) -> int:
        """Of all that, what lies on the device that computes."""
        if self.away:
            return self.bytes - self.stored_bytes
        layers = self.branches * self.network.layers
        return self.bytes - layers * self.front_tokens(self.moved) * (self.stored_token_bytes - self.number_bytes)

    @property
    def bytes(self) -> int:
        """Of all that a run takes beside the network's weights."""
        return self.history_bytes + self.activation_bytes + self.context_bytes + self.table_bytes


def window_bytes(network: NetworkSizes, grid: tuple[int, int], frames: int, rows: int, itemsize: int) -> int:
    """Works out what a forward takes whose chunks go through the network as one window: activations at their peak,
    texts' keys and values, and the rotary table.

    Args:
        network: its sizes.
        grid: rows and columns of tokens of a frame.
        frames: of the window, given ones included.
        rows: videos, times branches of guidance.
        itemsize: bytes of a number.
    """
    tokens = grid[0] * grid[1] * frames
    numbers = tokens * (network.dim + network.inside) + network.text_width * network.text_tokens
    return rows * numbers * itemsize + tokens * network.head_dim // 2 * 4 * 4


FORWARD_TOKENS = 4096  # of several chunks that go through a product at once: enough to keep a device busy


def plan_memory(
    network: NetworkSizes,
    schedule: ChunkSchedule,
    settings: Settings,
    policy: Policy,
    *,
    grid: tuple[int, int],
    chunk_frames: int,
    batch: int = 1,
    branches: int = 1,
    itemsize: int = 2,
    given: tuple[int, int] = (0, 0),
    at_once: bool = True,
    waiting: bool = False,
    also: frozenset[int] = frozenset(),
    texts: int = 1,
    last_frames: int = 0,
    rerun: int = 0,
) -> MemoryPlan:
    """Plans a run.

    Args:
        network: its sizes.
        schedule, settings, policy: of the run.
        grid: rows and columns of tokens of a frame.
        chunk_frames: latent frames of a chunk.
        batch, branches: videos, and branches of guidance.
        itemsize: bytes of a number.
        given: frames that fill no chunk, before the first one and after the last.
        at_once: whether all chunks of a tick are asked for in one call; otherwise they need their keys between calls.
        waiting: whether a finished chunk's clean pass always waits for the next tick (MAGI-1).
        also: steps that are recomputed whatever the policy says.
        texts: different ones that each branch is shown in the run; no more are kept than chunks are active.
        last_frames: of the last chunk where it is shorter than the others, else 0.
        rerun: finished frames that may be run once more, together, where one chunk runs after the other.
    """
    total, kept = schedule.total_chunks, settings.history.kept_frames(chunk_frames)
    bounded = kept is not None and kept < total * chunk_frames
    alone = schedule.max_active + int(waiting) == 1
    passing = settings.clean_pass and (alone or (at_once and aligned(policy, schedule, also)))
    packing = packing_of(settings.history.type, network.head_dim)
    if packing is not None and not passing:
        raise UserError(
            f"A history in {settings.history.type} needs chunks that recompute on the same ticks, a guider that is "
            "asked for them at once, and clean passes; take the preset high, balanced or fast, or store it as computed."
        )
    kind: Slots = "shared" if packing is not None or (bounded and passing and not alone) else "stored"
    slots = min(total, schedule.max_active + int(waiting)) if bounded or kind == "shared" else 0
    asking = 0
    if settings.history.keeps_queries and bounded:
        asked = asking_queries(settings.history.compression, grid[0] * grid[1] * chunk_frames)
        asking = len(range(grid[0] * grid[1] * chunk_frames)[asked])
    return MemoryPlan(
        network=network,
        batch=batch,
        branches=branches,
        itemsize=itemsize,
        grid=grid,
        chunk_frames=chunk_frames,
        lead=given[0],
        end=given[1],
        total_chunks=total,
        last_frames=last_frames or chunk_frames,
        clean_frames=kept if bounded and kept is not None else total * chunk_frames,
        max_active=min(total, schedule.max_active),
        slots=slots,
        kind=kind,
        asking=asking,
        relative=settings.history.relative,
        together=FORWARD_TOKENS,
        texts=min(texts, schedule.max_active + 1),
        away=settings.history.memory == "system",
        packing=packing,
        beginning_frames=kept if bounded and kept is not None and settings.history.compression.rolls_sink else 0,
        rerun=min(rerun, total * chunk_frames) if schedule.max_active == 1 else 0,
    )
