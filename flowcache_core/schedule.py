"""Which chunk takes which step when: one schedule for every autoregressive sampler."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .errors import UserError


class Given(Enum):
    """Frames that are given and fill no chunk. They stand where a chunk's number would."""

    LEAD = "lead"  # before the first chunk
    END = "end"  # after the last one


class Rerun(int):
    """Finished frames that are run once more, together. It stands where a chunk's number would: that of the chunk for
    whose texts they are run.

    Args:
        chunk: that number.
        frames: their numbers in the video, rising.
    """

    frames: tuple[int, ...]

    def __new__(cls, chunk: int, frames: tuple[int, ...]):
        made = super().__new__(cls, chunk)
        made.frames = frames
        return made

    def __getnewargs__(self):
        return int(self), self.frames

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rerun) and self.frames == other.frames

    def __hash__(self) -> int:
        return hash(self.frames)


class Shot(NamedTuple):
    """The shot that a video is in, which a run that goes on from it needs.

    Attributes:
        begins: number of its first frame, as frames are numbered; -1 in the first one.
        moved: frames by which its own are numbered higher than they are counted.
    """

    begins: int = -1
    moved: int = 0


class InShot(int):
    """A chunk of a video with several shots, after the first. It stands where its number would.

    Args:
        chunk: that number.
        begins: number of its shot's first frame, as frames are numbered.
        moved: frames by which its own are numbered higher than they are counted, so that shots lie apart in time.
    """

    begins: int
    moved: int

    def __new__(cls, chunk: int, begins: int, moved: int):
        made = super().__new__(cls, chunk)
        made.begins, made.moved = begins, moved
        return made

    def __getnewargs__(self):
        return int(self), self.begins, self.moved


@dataclass(frozen=True)
class Place:
    """One step of one chunk.

    Attributes:
        chunk: its number in the video, or the given frames.
        step: of the chunk; None for the clean pass, at noise level 0, which stores keys and values of what is finished.
        tick: of the run.
    """

    chunk: int | Given
    step: int | None
    tick: int

    @property
    def is_clean_pass(self) -> bool:
        return self.step is None


@dataclass(frozen=True)
class ChunkSchedule:
    """Chunk i is active in ticks [i * lag, i * lag + steps).

    Self-Forcing and its kin have lag = steps (one chunk at a time), MAGI-1 lag = steps / window, SkyReels-V2 lag =
    ar_step, Rolling Forcing lag 1, and lag 0 denoises all chunks together.

    Attributes:
        chunks: how many chunks are generated, at least 1.
        steps: denoising steps of a chunk.
        lag: ticks between the starts of two neighbouring chunks.
        prefix: chunks that are given and come before them; generated chunks are numbered from here.
        first_steps: steps of the first generated chunk, where it takes more than the others (Causal-Forcing).
        skipped: steps of the whole schedule that lie before these, where chunks start from a video
            (`engine.from_video`).
    """

    chunks: int
    steps: int
    lag: int
    prefix: int = 0
    first_steps: int | None = None
    skipped: int = 0

    def __post_init__(self):
        for name, least in (("chunks", 1), ("steps", 1), ("lag", 0), ("prefix", 0), ("skipped", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {least}.")
        if self.lag > self.steps:
            raise UserError(f"lag is {self.lag}, expected at most the {self.steps} steps of a chunk.")
        if self.first_steps is not None and self.first_steps < self.steps:
            raise UserError(
                f"first_steps is {self.first_steps}, expected at least the {self.steps} steps of the others."
            )

    @property
    def indices(self) -> range:
        """Numbers of the generated chunks."""
        return range(self.prefix, self.prefix + self.chunks)

    @property
    def whole_steps(self) -> int:
        """Steps of a chunk that starts from noise."""
        return self.steps + self.skipped

    @property
    def total_chunks(self) -> int:
        return self.prefix + self.chunks

    @property
    def ticks(self) -> int:
        return self.start(self.indices[-1]) + self.steps_of(self.indices[-1])

    @property
    def max_active(self) -> int:
        """The most chunks that are ever active at once."""
        return self.chunks if self.lag == 0 else min(self.chunks, -(-self.steps // self.lag))

    def steps_of(self, chunk: int) -> int:
        return self.first_steps if self.first_steps is not None and chunk == self.prefix else self.steps

    def start(self, chunk: int) -> int:
        """Gives the tick of a chunk's first step."""
        order = chunk - self.prefix
        delay = 0 if self.first_steps is None or order == 0 else self.first_steps - self.steps
        return order * self.lag + delay

    def active(self, tick: int) -> list[Place]:
        """Lists what happens in a tick, oldest chunk first."""
        places = []
        # Chunks older than this one have finished: no start lies further back than a chunk's own steps.
        oldest = 0 if self.lag == 0 else max(0, (tick - (self.first_steps or self.steps)) // self.lag)
        for chunk in self.indices[oldest:]:
            step = tick - self.start(chunk)
            if step < 0:
                break
            if step < self.steps_of(chunk):
                places.append(Place(chunk, step, tick))
        return places

    def __iter__(self) -> Iterator[list[Place]]:
        return (self.active(tick) for tick in range(self.ticks))
