"""Runs of Self-Forcing's kin over a history that is cut by frames."""

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HistorySettings, Settings
from flowcache_core.solvers import noise_levels
from flowcache_core.solvers.one_step import Renoise
from tests.helpers import golden_weights
from tests.helpers.golden_runs import frames_of
from tests.helpers.runs import build

FRAMES = 3  # of a chunk


def make(
    chunks: int,
    history: HistorySettings,
    frames: int = FRAMES,
    steps: int = 4,
    loaded=None,
    done: int = 0,
    lag: int = 4,
) -> Engine:
    """A run of so many chunks with the noise of the golden ones, one at a time unless the lag is below the steps; with
    a saved history, after `done`."""
    noise = frames_of("noise", (done + chunks) * frames).split(frames, dim=2)
    return build(
        WanBackbone(golden_weights.network()),
        ChunkSchedule(chunks, steps, min(lag, steps), prefix=done),
        classifier_free(golden_weights.text("cond")),
        noise_levels.linear(steps, 5.0),
        start=lambda chunk: noise[chunk],
        settings=Settings(history=history),
        noise=lambda chunk, step: frames_of(f"renoise.{chunk}.{step}", frames),
        solver=Renoise,
        **({} if loaded is None else {"loaded": loaded}),
    )
