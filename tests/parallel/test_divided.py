"""One video by 2 and by 4 processes equals that of one, and what they send and hold is what it should be."""

import pytest
import torch
from torch import Tensor

from flowcache_core.parallel.heads import HeadScheme, head_scheme
from flowcache_core.parallel.layout import planned_part
from flowcache_core.parallel.ranks import shares
from flowcache_core.parallel.ulysses import layer_numbers
from tests.helpers.divided import CONFIG, PIPED, RUNS, branches_of, divided, every_run, network

NEAR = 1e-6  # a product of fewer rows may sum in another order
ANEW = ("krea",)  # whose frames are run again in products of other sizes
FRAME, PATCH, FRAMES = 15, 16, 2  # tokens of a frame, numbers of a patch, frames of a chunk


@pytest.fixture(scope="module")
def alone():
    return {name: run() for name, run in RUNS.items()}


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    divided(every_run, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


CASES = [
    *(("ulysses", name) for name in RUNS),
    *(("pipeline", name) for name in PIPED),
    *(("sharded", name) for name in ("demo", "magi")),
    ("late", "demo"),
]


def away(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_processes_make_the_video_of_one(alone, found, scheme, name):
    expected, parts = alone[name].latents, [one[scheme, name] for one in found]
    assert all(torch.equal(part.latents, parts[0].latents) for part in parts)
    if branches_of(name) == 1 and scheme != "pipeline" and name not in ANEW:
        assert torch.equal(parts[0].latents, expected)
    assert away(parts[0].latents, expected) <= NEAR
    assert parts[0].saved == sum(part.nbytes for clean in alone[name].state.histories for part in clean)


def test_without_the_exchange_it_is_another_video(alone, found):
    assert away(found[0]["silent", "demo"].latents, alone["demo"].latents) > 1e-2


def test_bytes_sent_are_those_of_the_scheme(found):
    size = len(found)
    scheme, places = head_scheme(CONFIG.num_heads, size), shares(FRAME, size)
    for rank, one in enumerate(found):
        run, tokens = one["ulysses", "demo"], one["ulysses", "demo"].forwards * FRAMES
        layer = layer_numbers(scheme, places, rank, 1, CONFIG.dim // CONFIG.num_heads, tokens)
        head = (size - 1) * len(places[rank]) * PATCH * tokens
        assert run.sent == 4 * (CONFIG.num_layers * layer + head)
        run = one["pipeline", "demo"]
        if rank < size - 1:
            assert run.sent == 4 * run.forwards * FRAMES * FRAME * CONFIG.dim
        else:  # velocities, of all forwards but the three clean passes
            assert run.sent == 4 * (size - 1) * (run.forwards - 3) * FRAMES * FRAME * PATCH


def test_history_and_weights_are_divided(alone, found):
    size = len(found)
    whole = alone["magi"].report.history_bytes_allocated
    assert [one["ulysses", "magi"].held * size for one in found] == [whole] * size
    whole = alone["demo"].report.history_bytes_allocated
    assert [one["pipeline", "demo"].held * size for one in found] == [whole] * size
    scheme = head_scheme(CONFIG.num_heads, size)
    parts = [one["ulysses", "demo"].held * CONFIG.num_heads for one in found]
    assert parts == [whole * len(scheme.of(rank)) for rank in range(size)]
    weights = sum(weight.nbytes for weight in network().blocks.parameters())
    held = [one["sharded", "demo"].weights for one in found]
    assert sum(held) == weights and max(held) <= 1.05 * weights / size  # a matrix of one row stays whole


def test_the_scheme_that_wastes_less_is_taken():
    assert not head_scheme(40, 8).waste and not head_scheme(8, 4).waste
    uneven = head_scheme(12, 8)
    assert (uneven.group, [len(uneven.of(rank)) for rank in range(8)]) == (1, [2, 2, 2, 2, 1, 1, 1, 1])
    assert uneven.wasted_time == uneven.wasted_memory == pytest.approx(1 / 3)
    assert HeadScheme(12, 8, 2).waste == pytest.approx(1)
    grouped = head_scheme(8, 16)  # MAGI-1's key heads over 16 GPUs
    assert (grouped.group, grouped.wasted_time, grouped.wasted_memory) == (2, 0, 1)
    assert "groups of 2" in grouped.text() and "100% more history" in grouped.text()
    for heads, ranks in ((12, 8), (8, 16), (3, 4), (24, 5)):
        scheme = head_scheme(heads, ranks)
        held = [head for rank in range(0, ranks, scheme.group) for head in scheme.of(rank)]
        assert held == list(range(heads))
        assert all(rank in scheme.asks_for(other) for rank in range(ranks) for other in scheme.answers(rank))


def test_memory_is_planned_for_the_part_that_a_process_will_have():
    sizes = CONFIG.sizes
    half, branches = planned_part(sizes, "ulysses", 4, 2)  # groups of two, each with a branch
    assert branches == 1 and half.kv_heads == -(-sizes.kv_heads // 2) and half.inside == sizes.inside // 2
    assert planned_part(sizes, "ulysses", 2, 2) == (sizes, 1)
    assert planned_part(sizes, "ulysses", 2, 1)[0].kv_heads == -(-sizes.kv_heads // 2)
    piped, branches = planned_part(sizes, "pipeline", 2, 2)
    assert branches == 2 and piped.layers == -(-sizes.layers // 2) and piped.inside == sizes.inside
