"""A run of many chunks in bounded memory: time a chunk, history and process memory, chunk by chunk."""

import gc
import statistics
import time
from dataclasses import dataclass, field, replace

from ..demo.compare import CAPTION
from ..models.wan import WanBackbone
from ..settings import BY_FRAMES, HistorySettings, Settings
from . import process
from .runs import Clips, Method, engine_of
from .setups import Setup

EARLY = (49, 150)  # chunks 50 to 150
LATE = 100


@dataclass
class LongRun:
    """Attributes:
    seconds: each chunk's, from one handed out to the next.
    history: bytes in use when it was handed out.
    resident: bytes of the process then.
    settings: what was run, in words.
    """

    settings: str
    seconds: list[float] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    @property
    def slower(self) -> float:
        """Median time of the last 100 chunks over that of chunks 50 to 150."""
        early = self.seconds[slice(*EARLY)] or self.seconds  # of a run too short to tell
        return statistics.median(self.seconds[-LATE:]) / statistics.median(early)

    @property
    def grown(self) -> float:
        """Process memory at the end over that after chunk 50, less one."""
        return self.resident[-1] / self.resident[min(EARLY[0], len(self.resident) - 1)] - 1.0

    def as_dict(self) -> dict:
        return {
            "chunks": len(self.seconds),
            "settings": self.settings,
            "last_100_over_50_to_150": round(self.slower, 4),
            "rss_growth_after_chunk_50": round(self.grown, 5),
            "seconds_per_chunk": [round(second, 5) for second in self.seconds],
            "history_bytes": self.history,
            "rss_bytes": self.resident,
        }


def long_run(backbone: WanBackbone, setup: Setup, settings: Settings, chunks: int, budget: int = 3) -> LongRun:
    """Makes one clip of so many chunks, whose latents are dropped as they come, with positions relative to the
    window."""
    settings = replace(settings, history=HistorySettings(budget, BY_FRAMES, relative=True))
    engine = engine_of(Method("long run", settings=settings), setup, Clips(backbone, [CAPTION], chunks, seed=0))
    made = LongRun(f"{setup.name}, history of {budget} clean chunks, relative positions")
    gc.collect()
    last = time.perf_counter()
    for _ in engine.run():
        now = time.perf_counter()
        made.seconds.append(now - last)
        made.history.append(engine.forward.history_bytes[0])
        made.resident.append(process.resident())
        last = time.perf_counter()
    return made
