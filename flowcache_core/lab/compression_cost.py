"""What cutting the history costs: its share of a run, and against the published formula written out directly."""

import statistics
import time
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..history import cache
from ..history.compression import best_units, choose
from ..settings import Compression
from .allocation import Peak

HEADS, WIDTH, QUERIES = 4, 64, 48  # of the demo model: heads, head width, tokens of the chunk that asks


@dataclass(frozen=True)
class Cost:
    """Of one cut: seconds and extra bytes at the peak, ours and written out; share of tokens that both keep."""

    tokens: int
    seconds: float
    seconds_direct: float
    bytes: int
    bytes_direct: int
    same: float


def direct(queries: Tensor, keys: Tensor, keep: int, weight: float, pool: int) -> Tensor:
    """The published formula with its full matrices, heads x queries x keys and heads x keys x keys."""
    logits = queries @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
    looked_at = F.max_pool1d(logits.softmax(dim=-1).mean(dim=2), pool, stride=1, padding=pool // 2)
    units = F.normalize(keys, dim=-1)
    cosines = units @ units.transpose(-1, -2)
    alike = ((cosines.sum(dim=-1) - 1.0) / keys.shape[2]).softmax(dim=-1)
    return best_units(weight * looked_at - (1.0 - weight) * alike, keep)


def cut_cost(tokens: int, repeats: int = 5) -> Cost:
    """Cuts random keys of so many tokens by one chunk, both ways in alternation."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, HEADS, tokens, WIDTH, generator=generator)
    queries = torch.randn(1, HEADS, QUERIES, WIDTH, generator=generator) * 2.0
    settings, keep = Compression(), tokens - QUERIES

    def ours() -> Tensor:
        return choose(settings, queries, keys, keep, QUERIES, QUERIES).tokens(keys.shape[2])

    def written_out() -> Tensor:
        return direct(queries, keys, keep, settings.weight, settings.pool)

    a, b = ours(), written_out()
    same = sum(len(set(x.tolist()) & set(y.tolist())) for x, y in zip(a[0], b[0], strict=True)) / a.numel()
    times = [(_seconds(ours), _seconds(written_out)) for _ in range(repeats)]
    return Cost(
        tokens,
        statistics.median(pair[0] for pair in times),
        statistics.median(pair[1] for pair in times),
        _peak_bytes(ours),
        _peak_bytes(written_out),
        same,
    )


class Stopwatch:
    """Inside it, the time that histories spend on choosing and gathering what stays."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        def timed(*what) -> list[Tensor]:
            begun = time.perf_counter()
            kept = evict(*what)
            self.seconds += time.perf_counter() - begun
            return kept

        evict, self._patch = cache.evict, patch.object(cache, "evict", timed)
        self._patch.start()
        return self

    def __exit__(self, *error) -> None:
        self._patch.stop()


def _seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _peak_bytes(work) -> int:
    with Peak() as peak:
        work()
    return peak.peak
