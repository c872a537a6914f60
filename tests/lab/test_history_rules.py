"""Published rules for a short history: each shows what it says it does, and no more than its budget."""

from functools import partial

import pytest
import torch

from flowcache_core.demo import load_network
from flowcache_core.lab.history_rules import (
    PUBLISHED_RULES,
    DummyForcing,
    ForcingKV,
    Now,
    deep_forcing,
    pack_forcing,
    ruled_engine,
)
from flowcache_core.lab.quant_videogen import BLOCK, MEANS, grouped, two_bit_engine, two_bits
from flowcache_core.lab.runs import Clips, Method, run
from flowcache_core.lab.setups import Setup
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import Euler

QUICK = Setup("quick", 4, 4, magi, Euler)
FRAME, CHUNK, BUDGET, HEADS, WIDTH = 16, 48, 144, 4, 64


def asked(layer: int = 0, chunks: int = 6, layers: int = 2, keys: torch.Tensor | None = None) -> Now:
    draw = torch.Generator().manual_seed(layer)
    make = partial(torch.randn, generator=draw)
    count = chunks * CHUNK
    q, active, values = make(1, HEADS, CHUNK, WIDTH), make(1, HEADS, CHUNK, WIDTH), make(1, HEADS, count, WIDTH)
    keys = make(1, HEADS, count, WIDTH) if keys is None else keys
    return Now(layer, q, keys, values, active, FRAME, CHUNK, 4, 4, BUDGET, layers)


@pytest.fixture(scope="module")
def clips():
    return Clips.held_out(load_network(), 2, 5)


@pytest.mark.parametrize("name", PUBLISHED_RULES)
def test_a_rule_shows_its_budget_and_changes_nothing_before_it_is_reached(clips, name):
    whole = run(Method("whole"), QUICK, clips)

    def ruled(budget: int):
        return run(Method(name, build=partial(ruled_engine, rule=PUBLISHED_RULES[name], budget=budget)), QUICK, clips)

    assert torch.equal(ruled(5).latents, whole.latents)
    short = ruled(3)
    assert torch.equal(short.latents[:, :, :12], whole.latents[:, :, :12])  # the fourth chunk sees three
    assert not torch.equal(short.latents[:, :, 12:], whole.latents[:, :, 12:])
    assert short.history_bytes < whole.history_bytes


@pytest.mark.parametrize("name", PUBLISHED_RULES)
def test_heads_see_the_budget_on_average(name):
    rule = PUBLISHED_RULES[name]()
    for _ in range(2):
        seen = [rule(asked(layer)).tokens for layer in range(2)]
    assert BUDGET - 2 * FRAME <= sum(seen) / 2 <= BUDGET + 0.5


def test_dummy_heads_see_the_last_frame_and_are_those_that_look_at_the_history_least():
    rule = DummyForcing()
    assert rule(asked(0)).mask is not None and rule.groups is None  # not before all layers were seen
    rule(asked(1))
    seen = rule(asked(0)).mask
    assert (rule.groups == 2).sum() == HEADS  # of two layers' heads
    masses = torch.stack([rule.masses[layer] for layer in range(2)])
    least = torch.maximum(*(masses[:, part] / masses[:, part].sum() for part in (0, 1)))
    assert least[rule.groups == 2].max() <= least[rule.groups != 2].min()
    for head, group in enumerate(rule.groups[0]):
        places = seen[head].nonzero()[:, 0]
        assert places[-1] == (len(places) - 1 if group == 0 else 6 * CHUNK - 1)
        assert group != 2 or len(places) == FRAME


def test_forcing_kv_gives_static_heads_two_frames_and_dynamic_ones_what_changes():
    still = torch.randn(1, HEADS, FRAME, WIDTH).repeat(1, 1, 18, 1)  # every frame is like the one before it
    still[:, :, 8 * FRAME : 8 * FRAME + 4] += 5.0  # but for a patch of the ninth
    rule = ForcingKV()
    rule.static = {0: torch.tensor([True, False, False, False])}
    seen = rule(asked(keys=still)).mask
    assert seen[0].nonzero()[:, 0].tolist() == [*range(FRAME), *range(17 * FRAME, 18 * FRAME)]
    for head in (1, 2, 3):
        assert seen[head, :FRAME].all() and seen[head, -CHUNK:].all()
        assert seen[head, 8 * FRAME : 8 * FRAME + 4].all()
    rule.static = {0: torch.ones(HEADS, dtype=torch.bool)}
    assert rule(asked(keys=still)).tokens == 2 * FRAME


def test_forcing_kv_takes_heads_as_static_that_look_at_what_is_near():
    now = asked()
    near, far = now.active[:, :, -1:], now.keys[:, :, 5 * FRAME : 5 * FRAME + 1]
    looking = torch.where(torch.tensor([True, False, True, False])[None, :, None, None], near, far)
    rule = ForcingKV()
    rule(Now(0, 9 * looking.expand_as(now.q), *[getattr(now, name) for name in list(now.__dict__)[2:]]))
    assert rule.static[0].tolist() == [True, False, True, False]


def test_deep_forcing_keeps_a_deep_sink_the_newest_chunk_and_what_is_looked_at():
    now = asked()
    looked_at = slice(4 * CHUNK, 4 * CHUNK + BUDGET - BUDGET // 2 - CHUNK)
    keys = now.keys.clone()
    keys[:, :, looked_at] += 3 * now.q.sum(dim=2, keepdim=True)
    seen = deep_forcing(asked(keys=keys))
    expected = torch.cat([keys[:, :, : BUDGET // 2], keys[:, :, looked_at], keys[:, :, -CHUNK:]], dim=2)
    assert torch.equal(seen.keys, expected)


def test_pack_forcing_averages_squares_between_the_first_and_the_newest_chunk():
    keys = torch.arange(6 * CHUNK).float()[None, None, :, None].expand(1, HEADS, -1, WIDTH)
    seen = pack_forcing(asked(keys=keys)).keys[0, 0, :, 0]
    assert torch.equal(seen[:CHUNK], torch.arange(CHUNK).float()) and seen[-1] == 6 * CHUNK - 1
    middle = seen[CHUNK:-CHUNK].unflatten(0, (-1, 4))
    frame = torch.arange(FRAME).float().view(4, 4)
    squares = torch.stack([frame[:2, :2].mean(), frame[:2, 2:].mean(), frame[2:, :2].mean(), frame[2:, 2:].mean()])
    assert torch.equal(middle - middle[:, :1] + squares[0], squares.expand(len(middle), 4))
    assert len(middle) == min(12, (BUDGET - 2 * CHUNK) // 4) and middle[-1, 0] == 14 * FRAME + squares[0]


def test_two_bits_hold_means_and_a_sign(clips):
    means = 10 * torch.randn(1, HEADS, MEANS, BLOCK)
    signs = torch.randint(-1, 2, (1, HEADS, MEANS, CHUNK // MEANS, BLOCK // 2)).float()
    rest = torch.cat([signs, -signs], dim=-1)
    # Groups far apart, each symmetric about its mean, with -1, 0 and 1 of one size: held as they are.
    x = torch.cat([means[:, :, :, None] + rest, means[:, :, :, None] - rest], dim=3).flatten(2, 3)
    assert (two_bits(x) - x).abs().max() < 1e-4
    _, nearest = grouped(x)
    assert nearest.unflatten(-1, (MEANS, -1)).diff(dim=-1).abs().sum() == 0
    noise = torch.randn(1, HEADS, CHUNK, BLOCK)
    error = (two_bits(noise) - noise).norm() / noise.norm()
    assert 0.1 < error < 0.7
    whole = run(Method("whole"), QUICK, clips)
    small = run(Method("", build=two_bit_engine), QUICK, clips)
    assert torch.equal(small.latents[:, :, :3], whole.latents[:, :, :3])
    assert not torch.equal(small.latents[:, :, 3:], whole.latents[:, :, 3:])
    assert small.history_bytes < 0.5 * whole.history_bytes
