"""Properties of the one schedule, over many random ones."""

import math
import random

import pytest

from flowcache_core.schedule import ChunkSchedule


def schedules(count: int = 300):
    rng = random.Random(0)
    for _ in range(count):
        steps = rng.randint(1, 20)
        yield ChunkSchedule(rng.randint(1, 12), steps, rng.randint(0, steps), rng.randint(0, 3))


def test_every_chunk_takes_every_step_once_and_in_order():
    for schedule in schedules():
        taken = {chunk: [] for chunk in schedule.indices}
        for places in schedule:
            for place in places:
                taken[place.chunk].append(place.step)
        assert all(steps == list(range(schedule.steps)) for steps in taken.values()), schedule


def test_active_chunks_are_bounded_neighbours_oldest_first():
    for schedule in schedules():
        most = 0
        for places in schedule:
            chunks = [place.chunk for place in places]
            assert chunks == list(range(chunks[0], chunks[0] + len(chunks))), schedule
            most = max(most, len(chunks))
        assert most == schedule.max_active or schedule.chunks < schedule.max_active
        if schedule.lag:
            assert most <= math.ceil(schedule.steps / schedule.lag)


def test_a_chunk_starts_after_the_one_before_and_never_overtakes():
    for schedule in schedules():
        starts = [schedule.start(chunk) for chunk in schedule.indices]
        assert starts == sorted(starts)
        assert all(later - earlier == schedule.lag for earlier, later in zip(starts, starts[1:], strict=False))


def test_a_longer_first_chunk_delays_all_others():
    schedule = ChunkSchedule(3, steps=1, lag=1, first_steps=4)
    assert [[(p.chunk, p.step) for p in places] for places in schedule] == [
        [(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)], [(1, 0)], [(2, 0)]
    ]  # fmt: skip


def test_models_in_use():
    magi = ChunkSchedule(16, 64, 16)
    assert (magi.max_active, magi.ticks) == (4, 15 * 16 + 64)
    assert ChunkSchedule(16, 50, 5).max_active == 10
    assert ChunkSchedule(16, 4, 4).max_active == 1
    assert ChunkSchedule(16, 5, 1).max_active == 5


@pytest.mark.parametrize("wrong", [(0, 4, 1), (1, 0, 0), (1, 4, -1), (1, 4, 5), (1, 4, 1, -1)])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        ChunkSchedule(*wrong)
