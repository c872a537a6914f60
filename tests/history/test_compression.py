"""Scores against the paper's formulas written directly, and what must hold for every choice."""

from itertools import product

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.history import compression
from flowcache_core.history.cache import History
from flowcache_core.history.compression import asking_queries, best_units, choose, importance, redundancy
from flowcache_core.history.plan import NetworkSizes, plan_memory
from flowcache_core.history.positions import Positions
from flowcache_core.lab.allocation import Peak
from flowcache_core.models.rotary import Rotary
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import Compression, HistorySettings, Settings

FRAME, CHUNK = 4, 12


def chosen(settings, queries, keys, *sizes) -> torch.Tensor:
    """Numbers of the tokens that stay, [B, heads, kept]."""
    return choose(settings, queries, keys, *sizes).tokens(keys.shape[2])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direct_importance(queries, keys, pool):
    group = queries.shape[1] // keys.shape[1]
    logits = queries @ keys.repeat_interleave(group, dim=1).transpose(-1, -2) / keys.shape[-1] ** 0.5
    logits = logits.unflatten(1, (keys.shape[1], group)).amax(dim=2)
    mean = logits.softmax(dim=-1).mean(dim=2)
    return torch.nn.functional.max_pool1d(mean, pool, 1, pool // 2)


def direct_redundancy(keys):
    unit = keys / keys.norm(dim=-1, keepdim=True)
    alike = unit @ unit.transpose(-1, -2)
    alike.diagonal(dim1=-2, dim2=-1).zero_()
    return alike.mean(dim=-1).softmax(dim=-1)


@pytest.mark.parametrize("group, tile", list(product((1, 3), (2**20, 300))))
def test_scores_equal_the_formulas(monkeypatch, group, tile):
    monkeypatch.setattr(compression, "tile_bytes", lambda device: tile)  # the small one cuts everything to single rows
    queries, keys = draw(2, 2 * group, 9, 16), draw(2, 2, 40, 16, seed=1)
    assert torch.allclose(importance(queries, keys, 7), direct_importance(queries, keys, 7), atol=1e-6)
    assert torch.allclose(redundancy(keys), direct_redundancy(keys), atol=1e-6)


def test_what_is_looked_at_stays_and_what_repeats_goes():
    keys = draw(1, 1, 36, 16)
    queries = keys[:, :, 5:6] * 8
    kept = chosen(Compression(weight=1.0, pool=1), queries, keys, CHUNK, FRAME, CHUNK)
    assert 5 in kept
    keys[:, :, 20:32] = keys[:, :, 20:21]  # twelve copies of one token
    kept = chosen(Compression(weight=0.0), queries, keys, 2 * CHUNK, FRAME, CHUNK)[0, 0].tolist()
    assert sum(20 <= token < 32 for token in kept) == 0


@pytest.mark.parametrize("rule, unit", list(product(("flowcache", "window", "random"), ("token", "frame", "chunk"))))
def test_every_choice_is_whole_ordered_and_repeatable(rule, unit):
    keys, queries = draw(2, 3, 5 * CHUNK, 8), draw(2, 3, 7, 8, seed=2)
    settings = Compression(rule, granularity=unit)
    kept = chosen(settings, queries, keys, 3 * CHUNK, FRAME, CHUNK)
    assert kept.shape == (2, 3, 3 * CHUNK)
    assert (kept.diff(dim=-1) > 0).all() and kept.min() >= 0 and kept.max() < 5 * CHUNK
    assert torch.equal(kept, chosen(settings, queries, keys, 3 * CHUNK, FRAME, CHUNK))
    size = {"token": 1, "frame": FRAME, "chunk": CHUNK}[unit]
    assert (kept.unflatten(-1, (-1, size))[..., 0] % size == 0).all()


def test_protected_chunks_stay():
    keys, queries = draw(1, 2, 5 * CHUNK, 8), draw(1, 2, 7, 8, seed=2)
    settings = Compression(protect_first=True, protect_newest=True)
    kept = chosen(settings, queries, keys, 3 * CHUNK, FRAME, CHUNK)
    assert torch.equal(kept[0, 0, :CHUNK], torch.arange(CHUNK))
    assert torch.equal(kept[0, 1, -CHUNK:], torch.arange(4 * CHUNK, 5 * CHUNK))


def test_ties_keep_the_older_token():
    assert best_units(torch.zeros(1, 1, 9), 3).tolist() == [[[0, 1, 2]]]


def test_a_budget_must_hold_what_is_protected():
    with pytest.raises(UserError, match="at least 2 must stay"):
        HistorySettings(1, Compression(protect_first=True, protect_newest=True))


@pytest.mark.parametrize("lag, kind", [(4, "stored"), (2, "shared")])
@pytest.mark.parametrize("chunks, heads, frame", [(6, 8, (20, 26)), (40, 2, (30, 52))])
def test_a_cut_takes_little_memory_whatever_the_length(chunks, heads, frame, lag, kind):
    """Of a layer whose clean tokens are `chunks` chunks, and one more comes."""
    schedule, settings = ChunkSchedule(chunks + 2, 4, lag), Settings(history=HistorySettings(chunks))
    sizes = NetworkSizes(1, heads, heads, 64, heads * 64, 16 * heads * 64)
    policy = settings.reuse.policy(schedule)
    plan = plan_memory(sizes, schedule, settings, policy, grid=frame, chunk_frames=1)
    assert plan.kind == kind
    positions = Positions(plan, Rotary(64), torch.device("cpu"))
    history = History(plan, positions, settings.history, torch.bfloat16, keeps_slots=False)
    history.layers[0].keys.here.normal_(generator=torch.Generator().manual_seed(0))
    history.layers[0].values.here.zero_()
    history.clean = chunks * plan.chunk_tokens
    q, k, v = (draw(1, heads, plan.chunk_tokens, 64, seed=seed).bfloat16() for seed in range(3))
    with Peak() as peak:
        for chunk in (chunks, chunks + 1):
            history.arrange([chunk], [chunk] if chunk == chunks else [])
            history.open_layer(0)
            history.attend(0, chunk, q, k, v, lambda q, k, v: q, keep_queries=True)
            history.close_layer(0)
            history.commit([chunk] if chunk == chunks else [])
    assert history.clean == chunks * plan.chunk_tokens
    assert peak.peak <= 64 * 2**20, peak.peak / 2**20


def test_queries_that_ask_lie_spread_or_last():
    assert list(range(12))[asking_queries(Compression(queries=4), 12)] == [1, 4, 7, 10]
    assert list(range(12))[asking_queries(Compression(queries=4, asked_from="last"), 12)] == [8, 9, 10, 11]
    for everything in (Compression(queries=0), Compression(queries=12), Compression(queries=50)):
        assert list(range(12))[asking_queries(everything, 12)] == list(range(12))


def test_half_precision_chooses_the_same():
    keys, queries = draw(1, 2, 36, 8).half(), draw(1, 2, 5, 8).half()
    exact = chosen(Compression(), queries.float(), keys.float(), CHUNK, FRAME, CHUNK)
    assert torch.equal(chosen(Compression(), queries, keys, CHUNK, FRAME, CHUNK), exact)
