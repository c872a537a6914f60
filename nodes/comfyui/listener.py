"""What a sampler of ours tells while its run goes on; who wants to know overrides the methods."""

from ...flowcache_core.engine.loop import Boundary, Chunk, Engine, Progress
from ...flowcache_core.report import Report
from .steering import Steering


class RunListener:
    """Hears nothing."""

    def plan(self, report: Report) -> None:
        """Hears of a run before it begins; the report knows how large the history will be."""

    def steer(self, ahead: Boundary, steering: Steering) -> bool:
        """Is asked between ticks; True ends the run with the next chunk that is finished."""
        return False

    def progress(self, told: Progress, engine: Engine) -> None:
        """Hears that a tick is done."""

    def chunk(self, chunk: Chunk, engine: Engine) -> None:
        """Takes a finished chunk in the network's latent space, oldest first."""

    def settle(self) -> None:
        """Does now what was left for the next tick."""

    def done(self, engine: Engine, keeps_history: bool) -> None:
        """Hears of the end of a run, and whether another can go on from its history."""
