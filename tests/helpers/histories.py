"""Runs whose histories may leave the device, and a device (the CPU) that is told when its memory has run out."""

from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.history.cache import Attention, History
from flowcache_core.schedule import ChunkSchedule, Given
from flowcache_core.settings import OFF, Compression, Fixed, HistorySettings, Off, Reuse
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.runs import build
from tests.helpers.tiny import TINY

FRAMES = 2


@dataclass(frozen=True)
class Case:
    """Of a run: what it keeps, how it is guided and reused, and frames that are given before and after it."""

    kept: HistorySettings = HistorySettings()
    scale: float = 2.0
    lead: int = 0
    end: int = 0
    lag: int = 2
    reuse: Reuse = Off()


CASES = {
    "whole": Case(),
    "one branch": Case(scale=1.0),
    "budget": Case(HistorySettings(2)),
    "relative": Case(HistorySettings(2, relative=True)),
    "one at a time": Case(HistorySettings(2), lag=4),
    "one at a time, relative": Case(HistorySettings(2, relative=True), lag=4),
    "slots stay": Case(HistorySettings(2), reuse=Fixed((0, 1))),
    "slots stay, relative": Case(HistorySettings(2, relative=True), reuse=Fixed((0, 1))),
    "lead and end": Case(lead=1, end=1),
    "lead and end, relative": Case(HistorySettings(2, Compression("window"), relative=True), lead=1, end=1),
}
OF_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def noise(chunk: int, frames: int = FRAMES) -> torch.Tensor:
    return chunk_noise(3, chunk, (1, TINY.in_dim, frames, 6, 4))


def engine(
    backbone,
    case: Case,
    attention: Attention = F.scaled_dot_product_attention,
    overlap: bool = True,
    loaded=None,
) -> Engine:
    settings = replace(OFF, history=case.kept, reuse=case.reuse, overlap=overlap)
    return build(
        backbone, ChunkSchedule(6, 4, case.lag), classifier_free(text(0), text(1), case.scale),
        [1.0, 0.8, 0.5, 0.2, 0.0], noise, settings,
        lead=case.lead, end=case.end, attention=attention, loaded=loaded,
    )  # fmt: skip


def latents(made: Engine) -> torch.Tensor:
    plan = made.forward.plan
    if plan.lead:
        made.give(Given.LEAD, noise(100, plan.lead))
    if plan.end:
        made.give(Given.END, noise(200, plan.end))
    return torch.cat([chunk.latent for chunk in made.run()], dim=2)


def histories(made: Engine) -> list[History]:
    return [*made.forward.histories.values(), *made.forward.spare]


def on_device(each: History) -> int:
    """Bytes of a history that the device holds, the scratch aside."""
    return sum(part.here.nbytes for layer in each.layers for part in layer)


def a_chunk(each: History) -> int:
    """Bytes of a chunk's keys and values."""
    return each.plan.chunk_tokens * sum(part.here[:, :, :1].nbytes for layer in each.layers for part in layer)


def room(each: History) -> int:
    """Chunks that a history has room for."""
    return (each.plan.layer_tokens - each.plan.given_tokens) // each.plan.chunk_tokens


def cramped(backbone, case: Case, chunks: int, loaded=None) -> Engine:
    """A run whose attention needs what the histories' oldest chunks, so many, take up on the device."""

    def attention(q, k, v):
        if any(on_device(each) > left for each in histories(made)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return F.scaled_dot_product_attention(q, k, v)

    made = engine(backbone, case, attention, loaded=loaded)
    (each, *_) = histories(made)
    given = each.plan.given_tokens * a_chunk(each) // each.plan.chunk_tokens
    left = on_device(each) - given - chunks * a_chunk(each)
    return made


def fails_at(calls: set[int], work, error: Exception = torch.cuda.OutOfMemoryError("CUDA out of memory.")):
    """`work`, which runs out of memory at some of its calls."""
    number = count()

    def working(*args, **kwargs):
        if next(number) in calls:
            raise error
        return work(*args, **kwargs)

    return working
