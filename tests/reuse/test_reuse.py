"""Policies decide as they say, and a forecast is exact where it must be."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from flowcache_core import generate
from flowcache_core.errors import UserError
from flowcache_core.lab.adams_bashforth import AdamsBashforth2
from flowcache_core.models.presets import PRESETS
from flowcache_core.reuse.forecast import Corrector, Forecast
from flowcache_core.reuse.policies import Policy, aligned, relative_change
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.settings import Between, Drift, Every, Fixed, Off, Reuse, Settings, Spread
from flowcache_core.solvers.multistep import DPM2M, SkyReelsUniPC, UniPC
from flowcache_core.solvers.noise_levels import skyreels
from flowcache_core.solvers.one_step import Euler
from flowcache_core.solvers.weights import lagrange
from tests.helpers.tiny import TINY

POLYNOMIAL_1_3B = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -4.99875664e-2)


@dataclass
class Seen:
    """A chunk as a policy sees it."""

    steps: int
    step: int = 0
    drift: float = 0.0
    change: float | None = None


def decide(
    policy: Policy, schedule: ChunkSchedule, change: Callable[[Place], float] = lambda place: 0.02
) -> dict[int, list[bool]]:
    chunks = {chunk: Seen(schedule.steps_of(chunk)) for chunk in schedule.indices}
    taken: dict[int, list[bool]] = {chunk: [] for chunk in schedule.indices}
    for places in schedule:
        for place in places:
            seen = chunks[place.chunk]
            seen.step, seen.change = place.step, change(place) if place.step else None
        for place, again in zip(places, policy.decide([chunks[place.chunk] for place in places]), strict=True):
            taken[place.chunk].append(again)
    return taken


def listed(policy: Policy, schedule: ChunkSchedule, chunk: int = 0, **more) -> list[int]:
    """Recomputed steps of a chunk."""
    return [step for step, again in enumerate(decide(policy, schedule, **more)[chunk]) if again]


def random_settings(count: int = 100):
    rng = random.Random(1)
    for _ in range(count):
        steps = rng.randint(1, 40)
        schedule = ChunkSchedule(rng.randint(1, 5), steps, rng.randint(1, steps))
        warmup, last = rng.randint(0, 6), rng.random() < 0.5
        choice: list[Reuse] = [
            Off(),
            Every(rng.randint(1, 16), rng.randint(1, 8), warmup, last),
            Spread(rng.uniform(0.05, 1.0), rng.randint(1, 8)),
            Fixed(tuple(sorted(rng.sample(range(steps), min(steps, 3))))),
            Drift(rng.uniform(0, 0.3), warmup, last, whole_window=rng.random() < 0.5),
        ]
        yield rng.choice(choice), schedule


def test_a_chunks_first_step_is_always_recomputed_and_options_hold():
    for settings, schedule in random_settings():
        policy = settings.policy(schedule)
        for steps in decide(policy, schedule).values():
            assert steps[0], settings
            if isinstance(settings, Every | Drift):
                assert all(steps[: settings.warmup]), settings
                assert steps[-1] or not settings.last, settings
            known = policy.recomputed(schedule.steps)
            assert known is None or known == {step for step, again in enumerate(steps) if again}, settings


def test_drift_is_added_up_and_starts_anew():
    """0.02 a step over a threshold of 0.05: recomputed at the third, and then at every third."""
    schedule = ChunkSchedule(2, 10, 10)
    for chunk in (0, 1):
        assert listed(Drift(0.05, warmup=1).policy(schedule), schedule, chunk) == [0, 3, 6, 9]


def test_chunks_drift_by_themselves():
    schedule = ChunkSchedule(2, 8, 4)
    policy = Drift(0.05, warmup=1).policy(schedule)
    restless = decide(policy, schedule, lambda place: 0.1 if place.chunk else 0.0)
    assert sum(restless[0]) == 1 and all(restless[1])


def test_all_branches_of_a_chunk_are_decided_at_once(backbone):
    words = torch.randn(2, 1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(0))
    report = generate(
        backbone, words[0], 3, negative=words[1], guidance_scale=3.0, steps=12, lag=4, frames_per_chunk=2,
        latent_size=(6, 4), settings=Settings(Drift(0.3, warmup=2)),
    ).report  # fmt: skip
    assert report.decisions["cond"] == report.decisions["uncond"] and 0.1 < report.reused < 0.9


def test_teacache_decides_once_for_all_chunks_of_a_tick():
    schedule = ChunkSchedule(4, 12, 3)
    taken = decide(Drift(0.05, warmup=1, whole_window=True).policy(schedule), schedule)
    for places in schedule:
        later = {taken[place.chunk][place.step] for place in places if place.step}
        assert len(later) <= 1
    assert not all(taken[0])


def test_the_published_polynomial_recomputes_where_it_is_not_positive():
    schedule = ChunkSchedule(1, 20, 20)
    policy = Drift(0.1, warmup=1, rescale=POLYNOMIAL_1_3B).policy(schedule)
    assert all(decide(policy, schedule, lambda place: 0.001)[0])
    inside = decide(Drift(0.1, warmup=1, rescale=POLYNOMIAL_1_3B).policy(schedule), schedule, lambda place: 0.03)
    assert 0 < sum(inside[0]) < 20


def test_every_falls_on_the_same_ticks_for_all_active_chunks():
    for lag in (4, 5, 8, 16):
        schedule = ChunkSchedule(5, 4 * lag, lag)
        taken = decide(Every(8).policy(schedule), schedule)
        for places in schedule:
            assert len({taken[place.chunk][place.step] for place in places}) == 1


def test_aligned_says_whether_older_chunks_are_always_recomputed_with_younger_ones():
    """But for the tick on which a chunk begins; against what the decisions show."""
    found = set()
    for settings, schedule in random_settings(300):
        policy = settings.policy(schedule)
        if policy.watches or schedule.chunks < schedule.max_active + 1:
            continue
        taken = decide(policy, schedule)
        shown = all(
            taken[older.chunk][older.step]
            for places in schedule
            for at, place in enumerate(places)
            if place.step and taken[place.chunk][place.step]
            for older in places[:at]
        )
        assert aligned(policy, schedule) == shown, (settings, schedule)
        found.add(shown)
    assert found == {True, False}


@pytest.mark.parametrize("schedule", [ChunkSchedule(8, 64, 16), ChunkSchedule(12, 50, 5), ChunkSchedule(8, 4, 4)])
def test_the_recommended_presets_are_aligned(schedule):
    for name in ("off", "high", "balanced", "fast"):
        assert aligned(PRESETS[name].reuse.policy(schedule), schedule)
    assert aligned(PRESETS["paper slow"].reuse.policy(schedule), schedule) == (schedule.max_active == 1)


def test_what_is_recomputed_anyway_may_break_alignment():
    schedule = ChunkSchedule(4, 64, 16)
    policy = PRESETS["balanced"].reuse.policy(schedule)
    assert not aligned(policy, schedule, frozenset({1}))
    assert aligned(policy, schedule, frozenset({1, 17, 33, 49}))


def test_a_longer_first_chunk_of_a_few_step_model_is_left_alone_too():
    schedule = ChunkSchedule(3, 1, 1, 0, 4)
    for name in ("high", "balanced", "fast"):
        assert all(map(all, decide(PRESETS[name].reuse.policy(schedule), schedule).values()))


def test_few_step_models_are_left_alone_by_the_presets():
    schedule = ChunkSchedule(3, 4, 4)
    for name in ("high", "balanced", "fast"):
        taken = decide(PRESETS[name].reuse.policy(schedule), schedule)
        assert all(all(steps) for steps in taken.values()), name


def test_fixed_steps():
    schedule = ChunkSchedule(3, 8, 4)
    assert all(listed(Fixed((0, 2, 5)).policy(schedule), schedule, chunk) == [0, 2, 5] for chunk in range(3))
    assert listed(Fixed((2, 5)).policy(schedule), schedule) == [0, 2, 5]


def test_every_with_a_warmup_and_the_last_step():
    schedule = ChunkSchedule(1, 9, 9)
    assert listed(Every(3, warmup=2, last=True).policy(schedule), schedule) == [0, 1, 3, 6, 8]


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


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Between(order=3),
        lambda: Drift(-1),
        lambda: Drift(0.1, warmup=-1),
        lambda: Every(0),
        lambda: Every(2, warmup=-1),
        lambda: Spread(0.0),
        lambda: Spread(1.5),
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        wrong()


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
        x, y = plain.step(x, velocities[step], step), corrected.step(y, used, step, provisional=step not in recomputed)
    assert torch.allclose(x, y, atol=1e-9)
