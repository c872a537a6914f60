"""MAGI-1's schedules and scales against upstream's (tests/golden/README.md says how the numbers were made)."""

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.errors import UserError
from flowcache_core.models.magi import sampling as magi
from flowcache_core.schedule import ChunkSchedule
from tests.helpers.paths import GOLDEN_FOLDER

GOLDEN = load_file(GOLDEN_FOLDER / "magi_schedules.safetensors")


@pytest.mark.parametrize("steps", magi.STEP_COUNTS)
def test_times(steps):
    golden = GOLDEN[f"times.{steps}"]
    assert torch.equal(torch.tensor(magi.times(steps)), golden)
    assert magi.sigmas(steps)[0] == 1.0 and magi.sigmas(steps)[-1] == 0.0
    unshifted = torch.linspace(0, 1, steps + 1) ** 2
    assert (unshifted - golden).abs().max() > 0.1


def test_times_of_twelve_steps_in_the_other_order():
    found = magi.times(12, "16,16,8")
    assert torch.equal(torch.tensor(found), GOLDEN["times.12.16,16,8"])
    assert found != magi.times(12)


def test_three_quarters_of_the_way_counts_as_nearly_clean():
    for steps in (8, 16, 64):
        assert magi.near_clean(magi.times(steps)[3 * steps // 4])
        assert not magi.near_clean(magi.times(steps)[3 * steps // 4 - 1])


@pytest.mark.parametrize("order", ["8,16,16", "16,16,8"])
def test_step_sizes(order):
    interval = GOLDEN["interval.12" if order == "8,16,16" else f"interval.12.{order}"]
    expected = [4 / interval[step % 3].item() * 2 for step in range(12)]
    assert [magi.step_size(12, step, order) for step in range(12)] == expected
    assert [magi.step_size(steps, 3) for steps in (8, 16, 32, 64)] == [4, 8, 16, 32]


@pytest.mark.parametrize("steps", [8, 16])
def test_visible_chunks(steps):
    golden = GOLDEN[f"visible.{steps}"].tolist()
    assert [magi.visible_before(step, steps) + 1 for step in range(steps)] == golden[:-1]
    assert golden[-1] == 1  # a finished chunk sees itself alone
    assert magi.visible_before(0, steps, ()) is None


def test_guidance_weights():
    scales = magi.GuidanceScales()
    columns = [GOLDEN[f"guidance.{name}"].tolist() for name in ("times", "past", "text")]
    for t, past, text in zip(*columns, strict=True):
        assert scales.weights(t) == pytest.approx({"text": text, "past": past - text, "alone": 1 - past})
    assert len({(past, text) for _, past, text in zip(*columns, strict=True)}) == 2
    with pytest.raises(UserError, match="5 times, 2 past"):
        magi.GuidanceScales(past=(1.0, 1.0))


@pytest.mark.parametrize(("chunks", "prefix"), [(7, 0), (3, 0), (6, 2)])
def test_window_is_the_one_schedule(chunks, prefix):
    steps = 8
    lag = steps // magi.WINDOW
    schedule = ChunkSchedule(chunks - prefix, steps, lag, prefix=prefix)
    first, end, least, most = GOLDEN[f"window.{chunks}.{prefix}"].tolist()
    ticks = list(schedule)
    assert len(ticks) == lag * len(first)
    for tick, places in enumerate(ticks):
        stage, within = divmod(tick, lag)
        assert [place.chunk for place in places] == list(range(first[stage], end[stage]))
        stages = list(range(least[stage], most[stage]))[::-1]
        assert [place.step for place in places] == [done * lag + within for done in stages]


def test_steps_that_cannot_be_staged_are_told():
    with pytest.raises(UserError, match="multiple of 4 steps, got 10"):
        magi.times(10)
    with pytest.raises(UserError, match="cannot be divided among 3"):
        magi.visible_before(0, 16, (3, 2, 1))
