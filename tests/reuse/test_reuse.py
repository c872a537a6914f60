"""Policies decide as they say, and a forecast is exact where it must be."""

import random

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.lab.adams_bashforth import AdamsBashforth2
from flowcache_core.models.presets import PRESETS, ReuseSettings
from flowcache_core.reuse.policies import (  # fmt: skip
    Chunkwise,
    Corrector,
    FixedSteps,
    Forecast,
    Global,
    Periodic,
    relative_change,
)
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.solvers.multistep import DPM2M, SkyReelsUniPC, UniPC
from flowcache_core.solvers.noise_levels import skyreels
from flowcache_core.solvers.one_step import Euler
from flowcache_core.solvers.weights import lagrange

POLYNOMIAL_1_3B = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -4.99875664e-2)


def decide(policy, schedule: ChunkSchedule, change=lambda place: 0.02, branch="cond") -> dict[int, list[bool]]:
    taken: dict[int, list[bool]] = {}
    for places in schedule:
        for place in places:
            seen = change(place) if place.step else None
            taken.setdefault(place.chunk, []).append(policy.recompute(place, schedule.steps, branch, seen))
    return taken


def random_settings(count: int = 60):
    rng = random.Random(1)
    for _ in range(count):
        steps = rng.randint(1, 40)
        lag = rng.randint(1, steps)
        settings = ReuseSettings(
            rng.choice(["off", "even", "fixed", "flowcache", "teacache"]),
            every=rng.randint(1, 16), least=rng.randint(1, 8),
            steps=tuple(sorted(rng.sample(range(steps), min(steps, 3)))),
            align=rng.choice([None, lag]), threshold=rng.uniform(0, 0.3),
            warmup=rng.randint(0, 6), last=rng.random() < 0.5,
        )  # fmt: skip
        yield settings, ChunkSchedule(rng.randint(1, 5), steps, lag)


def test_a_chunks_first_step_is_always_recomputed_and_options_hold():
    for settings, schedule in random_settings():
        for steps in decide(settings.make(schedule), schedule).values():
            assert steps[0], settings
            if settings.policy in ("even", "flowcache", "teacache"):
                assert all(steps[: settings.warmup]), settings
                assert steps[-1] or not settings.last, settings


def test_drift_is_added_up_and_starts_anew():
    """0.02 a step over a threshold of 0.05: recomputed at the third, and then at every third."""
    schedule = ChunkSchedule(2, 10, 10)
    for steps in decide(Chunkwise(0.05, warmup=1), schedule).values():
        assert [i for i, again in enumerate(steps) if again] == [0, 3, 6, 9]


def test_chunks_and_branches_drift_by_themselves():
    schedule = ChunkSchedule(2, 8, 4)
    restless = decide(Chunkwise(0.05, warmup=1), schedule, lambda place: 0.1 if place.chunk else 0.0)
    assert sum(restless[0]) == 1 and all(restless[1])
    policy = Chunkwise(0.05, warmup=1)
    decide(policy, schedule, lambda place: 1.0, branch="cond")
    assert {branch for _, branch in policy.drift} == {"cond"}


def test_teacache_decides_once_for_all_chunks_of_a_tick():
    schedule = ChunkSchedule(4, 12, 3)
    taken = decide(Global(0.05, warmup=1), schedule)
    for places in schedule:
        later = {taken[place.chunk][place.step] for place in places if place.step}
        assert len(later) <= 1


def test_the_published_polynomial_recomputes_where_it_is_not_positive():
    policy = Chunkwise(0.1, warmup=1, rescale=POLYNOMIAL_1_3B)
    outside = decide(policy, ChunkSchedule(1, 20, 20), lambda place: 0.001)
    assert all(outside[0])
    inside = decide(Chunkwise(0.1, warmup=1, rescale=POLYNOMIAL_1_3B), ChunkSchedule(1, 20, 20), lambda place: 0.03)
    assert 0 < sum(inside[0]) < 20


def test_even_falls_on_the_same_ticks_for_all_active_chunks():
    for lag in (4, 5, 8, 16):
        schedule = ChunkSchedule(5, 4 * lag, lag)
        taken = decide(ReuseSettings("even", every=8, least=1).make(schedule), schedule)
        for places in schedule:
            assert len({taken[place.chunk][place.step] for place in places}) == 1


def test_a_longer_first_chunk_of_a_few_step_model_is_left_alone_too():
    schedule = ChunkSchedule(3, 1, 1, 0, 4)
    for name in ("high", "balanced", "fast"):
        policy = PRESETS[name].reuse.make(schedule)
        assert all(policy.recompute(Place(0, step, step), 4, "cond", None) for step in range(4))


def test_few_step_models_are_left_alone_by_the_presets():
    schedule = ChunkSchedule(3, 4, 4)
    for name in ("high", "balanced", "fast"):
        taken = decide(PRESETS[name].reuse.make(schedule), schedule)
        assert all(all(steps) for steps in taken.values()), name


def test_fixed_steps_and_their_alignment():
    schedule = ChunkSchedule(3, 8, 4)
    alone = decide(FixedSteps((0, 2, 5)), schedule)
    assert all([i for i, again in enumerate(steps) if again] == [0, 2, 5] for steps in alone.values())
    aligned = decide(FixedSteps((0, 2, 5), align=4), schedule)
    assert all([i for i, again in enumerate(steps) if again] == [0, 1, 2, 4, 5, 6] for steps in aligned.values())


def test_periodic():
    taken = decide(Periodic(3, warmup=2, last=True), ChunkSchedule(1, 9, 9))
    assert [i for i, again in enumerate(taken[0]) if again] == [0, 1, 3, 6, 8]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_exact_on_polynomials_of_its_order(order):
    a, b, c = (torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def curve(sigma):
        return a + (b * sigma if order > 0 else 0) + (c * sigma**2 if order > 1 else 0)

    forecast = Forecast(order)
    for sigma in (1.0, 0.9, 0.7, 0.6):
        forecast.add(sigma, curve(sigma))
    assert len(forecast.results) == order + 1
    assert torch.allclose(forecast.at(0.35), curve(0.35), atol=1e-4)
    assert torch.allclose(forecast.at(0.6), curve(0.6), atol=1e-5)
    assert sum(lagrange(tuple(forecast.steps), 0.35)) == pytest.approx(1.0)


def test_a_forecast_with_too_few_points_takes_the_order_they_allow():
    forecast = Forecast(2)
    forecast.add(1.0, torch.tensor([2.0]))
    assert forecast.at(0.5).item() == 2.0
    forecast.add(0.8, torch.tensor([1.0]))
    assert forecast.at(0.6).item() == pytest.approx(0.0, abs=1e-6)


def test_relative_change_is_the_papers():
    before, now = torch.tensor([1.0, -3.0]), torch.tensor([1.5, -3.5])
    assert relative_change([now], [before]) == pytest.approx([0.5 / 2.0])


@pytest.mark.parametrize("wrong", [{"order": 3}, {"threshold": -1}, {"every": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        ReuseSettings("even", **wrong)


@pytest.mark.parametrize("solver", [Euler, AdamsBashforth2, DPM2M, UniPC, SkyReelsUniPC])
@pytest.mark.parametrize("order, recomputed", [(1, (0, 3, 4, 8, 11)), (2, (0, 1, 4, 8, 11))])
def test_a_corrected_run_is_the_plain_one_where_velocities_lie_on_the_curve(solver, order, recomputed):
    """Whatever the solver remembers: it has taken every step as in the plain run."""
    parts = [torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(4)]
    velocities = [
        sum(part * (step / 12) ** power for power, part in enumerate(parts[: order + 1])) for step in range(12)
    ]
    sigmas = skyreels(12)
    plain, corrected = solver(sigmas, None), solver(sigmas, None)
    x = y = parts[3]
    corrector, forecast = Corrector(order), Forecast(order)
    for step in range(12):
        if step in recomputed:
            forecast.add(step, velocities[step])
        used = forecast.at(step)
        if step in recomputed:
            y = corrector.step(y, corrected, used, step)
            assert torch.allclose(x, y, atol=1e-9)
        x, y = plain.step(x, velocities[step], step), corrected.step(y, used, step, coasting=step not in recomputed)
    assert torch.allclose(x, y, atol=1e-9)
