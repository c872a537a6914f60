"""Runs whose histories may leave the device, and a device (the CPU) that is told when its memory has run out."""

from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F

from flowcache_core.engine.loop import Engine, guidance
from flowcache_core.engine.runner import Runner
from flowcache_core.history.cache import History
from flowcache_core.history.chunk_view import AttentionFunction
from flowcache_core.history.compression import Compression
from flowcache_core.history.settings import HistorySettings
from flowcache_core.models.presets import OFF
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.tiny import TINY

FRAMES = 2


@dataclass(frozen=True)
class Case:
    """Of a run: what it keeps, how it is guided, and frames that are given before and after it."""

    kept: HistorySettings = HistorySettings()
    scale: float = 2.0
    lead: int = 0
    end: int = 0


CASES = {
    "whole": Case(),
    "one branch": Case(scale=1.0),
    "budget": Case(HistorySettings(2)),
    "relative": Case(HistorySettings(2, relative=True)),
    "lead and end": Case(lead=1, end=1),
    "lead and end, relative": Case(HistorySettings(2, Compression("window"), relative=True), lead=1, end=1),
}
OF_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def noise(chunk: int, frames: int = FRAMES) -> torch.Tensor:
    return chunk_noise(3, chunk, (1, TINY.in_dim, frames, 6, 4))


def engine(
    backbone, case: Case, attention: AttentionFunction = F.scaled_dot_product_attention, overlap: bool = True
) -> Engine:
    settings = replace(OFF, history=case.kept, overlap=overlap)
    run = Runner(backbone, ChunkSchedule(6, 4, 2), settings, FRAMES, attention, lead=case.lead, end=case.end)
    return Engine(run, guidance(run, text(0), text(1), case.scale), [1.0, 0.8, 0.5, 0.2, 0.0], noise)


def latents(made: Engine) -> torch.Tensor:
    given = made.runner.given
    if given.lead:
        made.prefill(noise(100, given.lead))
    if given.end:
        made.prefill_end(noise(200, given.end))
    return torch.cat([chunk.latent for chunk in made.run()], dim=2)


def histories(made: Engine) -> list[History]:
    return list(made.runner.histories.values())


def on_device(each: History) -> int:
    """Bytes of a history that the device holds."""
    return sum(part.here.nbytes for layer in each.layers for part in layer.parts)


def a_chunk(each: History) -> int:
    """Bytes of a chunk's keys and values."""
    return each.shape.chunk_tokens * sum(part.here[:, :, :1].nbytes for layer in each.layers for part in layer.parts)


def cramped(backbone, case: Case, chunks: int) -> Engine:
    """A run whose attention needs what the histories' oldest chunks, so many, take up on the device."""

    def attention(q, k, v):
        kept = histories(made)
        if len(kept) == branches and any(on_device(each) > room for each in kept):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return F.scaled_dot_product_attention(q, k, v)

    branches = 2 if case.scale != 1.0 else 1
    plain = engine(backbone, case)
    latents(plain)
    (each, *_) = histories(plain)
    given = each.shape.given_tokens * a_chunk(each) // each.shape.chunk_tokens
    room = on_device(each) - given - chunks * a_chunk(each)
    made = engine(backbone, case, attention)
    return made


def fails_at(calls: set[int], work):
    """`work`, which runs out of memory at some of its calls."""
    number = count()

    def working(*args, **kwargs):
        if next(number) in calls:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return work(*args, **kwargs)

    return working
