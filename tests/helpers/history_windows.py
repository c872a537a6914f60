"""Runs of Self-Forcing's kin over a history that is cut by frames."""

from collections.abc import Sequence

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HistorySettings, Settings
from flowcache_core.solvers import noise_levels
from flowcache_core.solvers.one_step import Renoise, SolverFactory
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
    return golden_run(
        ChunkSchedule(chunks, steps, min(lag, steps), prefix=done),
        noise_levels.linear(steps, 5.0),
        Settings(history=history),
        ["cond"] * (done + chunks),
        frames=frames,
        loaded=loaded,
    )


def golden_run(
    schedule: ChunkSchedule, levels: Sequence[float], settings: Settings, shown: Sequence[str], *,
    frames: int = FRAMES, solver: SolverFactory = Renoise, **more,
) -> Engine:  # fmt: skip
    """A run on the golden weights with the noise of the golden ones; `shown`: the text of each chunk, `more`: for
    `RunSettings`."""
    texts = {name: golden_weights.text(name) for name in shown}
    noise = frames_of("noise", schedule.total_chunks * frames).split(frames, dim=2)
    return build(
        WanBackbone(golden_weights.network()),
        schedule,
        classifier_free(lambda chunk: texts[shown[chunk]]),
        levels,
        start=lambda chunk: noise[chunk],
        settings=settings,
        noise=lambda chunk, step: frames_of(f"renoise.{chunk}.{step}", frames),
        solver=solver,
        **more,
    )
