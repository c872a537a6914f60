"""The levels that the families' own configurations give."""

from collections.abc import Sequence

import pytest

from flowcache_core.solvers import noise_levels as levels


def timesteps(sigmas: Sequence[float]) -> list[float]:
    return [round(1000 * sigma, 2) for sigma in sigmas[:-1]]


def test_few_step_models():
    assert timesteps(levels.linear(4, 5.0)) == [1000, 937.5, 833.33, 625]
    assert timesteps(levels.linear(2, 5.0)) == [1000, 833.33]
    assert timesteps(levels.linear(1, 5.0)) == [1000]
    assert timesteps(levels.linear(5, 5.0)) == [1000, 952.38, 882.35, 769.23, 555.56]
    assert timesteps(levels.CAUSVID_3_STEPS) == [1000, 757, 522]
    assert timesteps(levels.linear(4, 8.0)) == [1000, 960, 888.89, 727.27]


def test_causvid_looks_its_levels_up():
    found = levels.nearest_trained(levels.CAUSVID_3_STEPS)
    assert found == pytest.approx([1, 0.756757, 0.521739, 0], abs=1e-6)
    warped = levels.linear(4, 5.0)
    assert levels.nearest_trained(warped, 5.0) == pytest.approx(warped, abs=1e-12)


def test_skyreels():
    sigmas = levels.skyreels()
    assert len(sigmas) == 51 and sigmas[-1] == 0
    assert sigmas[0] == pytest.approx(8 * 0.999 / (1 + 7 * 0.999))
    assert [int(t) for t in timesteps(sigmas)[:3]] == [999, 997, 994]


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_linear_falls_from_noise_to_clean(steps, shift):
    sigmas = levels.linear(steps, shift)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert levels.linear(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
