"""The lab's runs are what they are called: batches equal single clips, the plain window equals the history."""

from functools import partial

import pytest
import torch

from flowcache_core.demo import load_network
from flowcache_core.engine.forward import Velocity
from flowcache_core.lab.adams_bashforth import AdamsBashforth2
from flowcache_core.lab.easycache import easycache_engine
from flowcache_core.lab.forecasts import forecasting_engine, hermite, taylor
from flowcache_core.lab.magcache import magcache_engine, magnitudes, recomputed_steps
from flowcache_core.lab.methods import peers
from flowcache_core.lab.motioncache import ALIKE, WARMUP, MotionCacheForward, Tokens, motioncache_engine
from flowcache_core.lab.runs import Clips, Method, plain_forwards, run
from flowcache_core.lab.setups import SETUPS, Setup
from flowcache_core.settings import HELD, Between, Drift, Every, Fixed, Settings
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import Euler
from flowcache_core.solvers.weights import lagrange

QUICK = Setup("quick", 8, 2, magi, Euler, window=True)


@pytest.fixture(scope="module")
def clips():
    return Clips.held_out(load_network(), 2, 3)


def test_a_batch_of_clips_is_its_clips(clips):
    settings = Settings(Every(2))
    both = run(Method("ours", settings=settings), QUICK, clips)
    alone = run(Method("ours", settings=settings), QUICK, Clips(clips.backbone, clips.captions[:1], clips.chunks))
    assert (both.latents[:1] - alone.latents).abs().max() < 1e-4
    assert (both.forwards, both.history_bytes) == (alone.forwards, alone.history_bytes)


def test_a_window_recomputed_at_every_tick_is_the_history(clips):
    window, history = run(Method("plain", window=True), QUICK, clips), run(Method("history only"), QUICK, clips)
    assert (window.latents - history.latents).abs().max() < 1e-3
    assert window.forwards == plain_forwards(QUICK, clips.chunks) == 3 * (8 + 2 * 2)
    assert history.forwards == 3 * (8 + 1)


def test_easycache_recomputes_everything_at_zero_and_little_at_a_high_threshold(clips):
    plain = run(Method("plain"), QUICK, clips)
    never, often = (
        run(Method("EasyCache's rule", build=partial(easycache_engine, threshold=threshold)), QUICK, clips)
        for threshold in (0.0, 10.0)
    )
    assert torch.equal(never.latents, plain.latents)
    rows = often.report.decisions["cond"]
    assert all(steps[0] for steps in rows.values())
    # One decision for all chunks that were recomputed before.
    assert often.forwards < plain.forwards / 2


def test_published_forecasts_are_sums_of_differences():
    assert list(taylor((3, 7), 9)) == pytest.approx(lagrange((3, 7), 9))  # a line
    assert list(taylor((2,), 9)) == list(hermite((2,), 9)) == [1.0]
    # Results 5, 3, 2 two steps apart: differences -1/2 and 1/4, so three steps on 2 - 3/2 + 9/2 / 4.
    results, x = torch.tensor([5.0, 3.0, 2.0]), 3
    assert (results @ torch.tensor(taylor((0, 2, 4), 4 + x))).item() == pytest.approx(2 - x / 2 + x * x / 2 / 4)
    # Its sigma is 1/2: H1(x/2) = x and H2(x/2) = x^2 - 2, times sigma and sigma^2 / 2.
    expected = 2 - x / 2 * 0.5 + (x * x - 2) / 2 * 0.25 / 4
    assert (results @ torch.tensor(hermite((0, 2, 4), 4 + x))).item() == pytest.approx(expected)
    assert sum(taylor((0, 3, 4), 9)) == pytest.approx(1) and sum(hermite((0, 3, 4), 9)) == pytest.approx(1)


def test_a_run_with_other_weights_is_another_one(clips):
    settings = Settings(Every(2), Between(2, correct=False))
    made = {
        weights: run(
            Method("", settings=settings, build=partial(forecasting_engine, weights=weights)), QUICK, clips
        ).latents
        for weights in (lagrange, taylor, hermite)
    }
    assert torch.equal(made[lagrange], run(Method("", settings=settings), QUICK, clips).latents)
    assert all(not torch.equal(made[weights], made[lagrange]) for weights in (taylor, hermite))


def test_magcache_skips_by_its_curve(clips):
    assert recomputed_steps([1.0] * 10, threshold=0.1, most=2) == (0, 1, 4, 7)  # nothing changes: two in a row
    falling = [1.0] + [0.9] * 9  # a step's distance from 1 is 0.1, two steps' 0.1 + 0.19
    assert recomputed_steps(falling, threshold=0.11, most=9) == (0, 1, 3, 5, 7, 9)
    assert recomputed_steps(falling, threshold=0.3, most=9) == (0, 1, 4, 7)
    ratios = magnitudes(clips.backbone, QUICK)
    assert len(ratios) == QUICK.steps and all(0.3 < ratio < 3 for ratio in ratios)
    steps = recomputed_steps(ratios, 0.2, 2)
    assert 1 < len(steps) < QUICK.steps
    held = Settings(Drift(0.0), HELD)
    ours = run(
        Method("", settings=held, build=partial(magcache_engine, setup=QUICK, threshold=0.2, most=2)), QUICK, clips
    )
    assert torch.equal(ours.latents, run(Method("", settings=Settings(Fixed(steps), HELD)), QUICK, clips).latents)


def test_motioncache_recomputes_tokens_by_themselves(clips):
    def ruled(threshold: float):
        return run(Method("", build=partial(motioncache_engine, threshold=threshold)), QUICK, clips)

    plain, all_of_them, some, none = run(Method("plain"), QUICK, clips), ruled(0.0), ruled(0.4), ruled(100.0)
    assert torch.equal(all_of_them.latents, plain.latents) and all_of_them.forwards == plain.forwards
    warm = 3 * (WARMUP + 1 + 1)  # the steps up to the warm-up, and the clean pass
    assert none.forwards == warm < some.forwards < plain.forwards


def test_motioncache_weighs_tokens_by_their_motion():
    answer = torch.ones(1, 16, 3, 8, 8)
    answer[:, :, 1, 2:4, 4:6] = 3.0  # a token that differs from the frames before and after
    known = Tokens(answer, Velocity(answer, ()), torch.zeros(1, 3, 4, 4), times=ALIKE)
    weights = MotionCacheForward._weights(known)
    assert weights[0, 1, 1, 2] > 15 and weights[0, 2, 1, 2] > 15  # of 16 in the frame, all others are still
    assert torch.equal(weights[:, 0], weights[:, 1]) and weights[0, 1].sum() == pytest.approx(16, rel=1e-4)
    known.times = ALIKE - 1
    assert torch.equal(MotionCacheForward._weights(known), torch.ones(1, 3, 4, 4))


def test_adams_bashforth_is_exact_on_a_velocity_that_is_a_line():
    sigmas = [1.0, 0.7, 0.5, 0.2, 0.0]
    solver, x = AdamsBashforth2(sigmas), torch.tensor([2.0])
    exact = [2.0 + (s**2 - 1.0) for s in sigmas]  # dx/dsigma = 2 sigma
    x = solver.step(torch.tensor([exact[0]]), torch.tensor([2.0 * sigmas[0]]), 0)
    x = torch.tensor([exact[1]])
    for step in range(1, 4):
        x = solver.step(x, torch.tensor([2.0 * sigmas[step]]), step)
        assert x.item() == pytest.approx(exact[step + 1], abs=1e-6)


def test_every_peer_has_a_curve():
    for setup in SETUPS.values():
        sweep = list(peers(setup, 9))
        assert len({(method.name, method.setting) for method in sweep}) == len(sweep)
        assert all((method.steps or setup.steps) <= setup.steps for method in sweep)
        names = [method.name for method in sweep]
        assert len(set(names[: len(set(names))])) == len(set(names))  # where time is short, one point of each
