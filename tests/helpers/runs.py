"""Engines of small runs, put together as `generate` does it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowcache_core.engine.build import RunSettings, build_engine, given_chunks
from flowcache_core.engine.guidance import Guidance
from flowcache_core.engine.loop import Engine, Sampling
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Settings
from flowcache_core.solvers.one_step import Euler, no_noise


def build(
    backbone,
    schedule: ChunkSchedule,
    guidance: Guidance,
    sigmas: Sequence[float],
    start: Callable[[int], Tensor],
    settings: Settings = OFF,
    *,
    seeing="causal",
    noise=no_noise,
    solver=Euler,
    first_sigmas: Sequence[float] | None = None,
    **more,
) -> Engine:
    """A run of the chunks that `start` gives, in their shape and type; `more` goes to `RunSettings`."""
    first = start(schedule.indices[0])
    sampling = Sampling(sigmas, start, noise, solver, first_sigmas)
    run = RunSettings(
        backbone, guidance, schedule, settings, sampling, seeing, first.shape,
        more.pop("branches", None) or len(guidance.texts), first.dtype, first.device, **more,
    )  # fmt: skip
    return build_engine(run)


def give(engine: Engine, prefix: Tensor, chunk_frames: int, condition: float = 0.0) -> None:
    """Runs frames that come before: those that fill no chunk, then whole chunks."""
    for chunk, latent in given_chunks(prefix, prefix.shape[2] % chunk_frames, chunk_frames):
        engine.give(chunk, latent, condition)


def video(engine: Engine) -> Tensor:
    """Runs an engine to its end."""
    return torch.cat([chunk.latent for chunk in engine.run()], dim=2)
