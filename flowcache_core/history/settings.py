"""How much history a run keeps, and how large that is."""

from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..models.rotary import Rotary
from ..schedule import ChunkSchedule
from .compression import Compression


@dataclass(frozen=True)
class HistorySettings:
    """How much clean history a run keeps.

    Attributes:
        budget: clean chunks that are kept, or None for all of them.
        compression: how the history is cut when it is over budget.
        relative: rotary positions count from the start of the window, not of the video, so that a run of any length
            uses only positions from 0 to (budget + active) chunks. Needs a budget. Costs a copy of the part of each key
            that is rotated by time.
        memory: "auto" keeps the history on the device that computes, and moves its oldest chunks to system memory, one
            after another, when that device runs out; "system" keeps all of it there from the start. What is there is
            brought back for attention, a layer at a time.
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
