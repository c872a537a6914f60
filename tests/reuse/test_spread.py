"""Where the recomputed steps of a chunk lie."""

from itertools import combinations

import pytest

from flowcache_core.reuse.placement import expected_error, neighbours, place_steps
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import Between, Every, Fixed, Spread

SHAPES = ((64, 16), (50, 5), (4, 4), (12, 3), (50, 50))


def aligned(chosen, steps, lag):
    """Whoever recomputes after its first step finds the older chunks recomputed too."""
    return all(step + lag in chosen for step in chosen if 0 < step < steps - lag)


@pytest.mark.parametrize("steps, lag", SHAPES)
def test_as_many_as_asked_and_on_common_ticks(steps, lag):
    for count in range(1, min(steps, 20) + 1):
        taken = place_steps(ChunkSchedule(4, steps, lag), count)
        assert len(taken) == count and taken[0] == 0 and list(taken) == sorted(set(taken)) and taken[-1] < steps
        if count > steps // lag:
            assert aligned(taken, steps, lag)


@pytest.mark.parametrize("steps, lag", SHAPES)
def test_more_steps_are_expected_to_err_less(steps, lag):
    errors = [expected_error(frozenset(place_steps(ChunkSchedule(4, steps, lag), count)), steps) for count in (2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert expected_error(frozenset(range(steps)), steps) == 0.0


def test_neighbours_are_as_many_and_aligned():
    chosen, steps, lag = frozenset(place_steps(ChunkSchedule(4, 64, 16), 9)), 64, 16
    found = list(neighbours(chosen, frozenset({0}), steps, lag))
    assert chosen not in found and all(len(other) == 9 and 0 in other for other in found)
    assert all(aligned(other, steps, lag) for other in found)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_hardly_any_aligned_list_is_better(count):
    """Against every list that there is, on a schedule small enough."""
    steps, lag = 12, 3
    lists = [{0, *rest} for rest in combinations(range(1, steps), count - 1)]
    multiples = {3, 6, 9} if count > 3 else {6, 9}  # all of them are in the list where they fit
    fair = [frozenset(one) for one in lists if aligned(one, steps, lag) and multiples <= one]
    chosen = expected_error(frozenset(place_steps(ChunkSchedule(4, steps, lag), count)), steps)
    assert chosen <= 1.1 * min((expected_error(one, steps) for one in fair), default=chosen)


@pytest.mark.parametrize("steps, lag", [(1000, 16), (1000, 1000), (250, 5), (250, 250)])
def test_long_schedules_are_no_harder(steps, lag):
    taken = place_steps(ChunkSchedule(4, steps, lag), steps // 4)
    assert len(set(taken)) == steps // 4 and taken[0] == 0 and taken[-1] < steps
    assert steps == 1000 or aligned(taken, steps, lag)


def test_a_parabola_forecasts_where_steps_lie_close():
    schedule = ChunkSchedule(4, 64, 16)

    def order(reuse, between=Between()) -> int:
        return between.order_for(reuse.policy(schedule), schedule.steps)

    assert [order(Spread(count / 64, least=1)) for count in (6, 8, 15, 30)] == [1, 1, 2, 2]
    assert order(Fixed(range(0, 64, 2))) == order(Every(2)) == 2  # whoever placed the steps
    assert order(Every(16)) == 1
    assert order(Spread(0.5), Between(0)) == 0
