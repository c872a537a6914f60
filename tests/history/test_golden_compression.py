"""Which tokens stay, against FlowCache's own compressors (tests/golden/README.md)."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from flowcache_core.history.compression import choose
from flowcache_core.settings import Compression
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden

GOLDEN = golden("compression")
STRATEGIES = ("token", "frame", "chunk")
ASKED = {"chunk": 0, "frame": 6, "token": 50}  # how many of the last queries ask


def inputs(name: str, clean: int, after: int, asked: int, heads: int, kv_heads: int):
    """Clean keys [1, kv heads, N, 32] and queries [1, heads, Q, 32], drawn as [tokens, heads, width]."""
    keys = 1.5 * normal(f"{name}.keys", (clean + after, kv_heads, 32)) + normal(f"{name}.shared", (1, kv_heads, 32))
    queries = normal(f"{name}.queries", (asked, heads, 32))
    return keys[:clean].transpose(0, 1)[None], queries.transpose(0, 1)[None]


def magi(settings: Compression) -> torch.Tensor:
    """5 clean chunks of 6 frames of 2 x 3 tokens, cut to 3; 2 active chunks, 6 query heads on 2 key heads."""
    keys, queries = inputs("magi", 5 * 36, 2 * 36, 72, 6, 2)
    return choose(settings, queries, keys, 3 * 36, frame_tokens=6, chunk_tokens=36).tokens(keys.shape[2])[0]


@pytest.mark.parametrize(("granularity", "asked"), list(product(STRATEGIES, ASKED)))
def test_magi(granularity, asked):
    kept = magi(Compression(granularity=granularity, queries=ASKED[asked], asked_from="last"))
    assert kept.tolist() == GOLDEN[f"magi.{granularity}.{asked}"].tolist()


@pytest.mark.parametrize(("chunks", "budget"), [(2, 1), (6, 3)])
def test_skyreels(chunks, budget):
    keys, queries = inputs("skyreels", chunks * 30, 0, 30, 3, 3)
    kept = choose(Compression(), queries, keys, budget * 30, frame_tokens=6, chunk_tokens=30).tokens(keys.shape[2])[0]
    assert kept.tolist() == GOLDEN[f"skyreels.{chunks}.{budget}"].tolist()


@pytest.mark.parametrize(
    "change", [{"weight": 0.0}, {"weight": 1.0}, {"pool": 1}, {"queries": 6}, {"queries": 6, "asked_from": "last"}]
)
def test_the_golden_would_notice(change):
    assert magi(replace(Compression(), **change)).tolist() != GOLDEN["magi.token.chunk"].tolist()
