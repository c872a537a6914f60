"""Recommended settings of the families."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.models.families import FAMILIES, POLYNOMIAL_1_3B, POLYNOMIAL_14B, family, fitted
from flowcache_core.settings import Drift, Every
from flowcache_core.solvers import noise_levels as levels


def shifted(shift: float, *timesteps: int) -> list[float]:
    """The levels of time-steps as configurations list them."""
    return [*(levels.shifted(timestep / 1000, shift) for timestep in timesteps), 0.0]


def test_few_step_models_take_the_published_levels():
    causal, causvid, rolling = FAMILIES["causal"], FAMILIES["causvid"], FAMILIES["rolling"]
    assert causal.levels(4) == shifted(5.0, 1000, 750, 500, 250)
    assert causal.levels(2) == shifted(5.0, 1000, 500)
    assert causal.levels(1) == shifted(5.0, 1000)
    assert causal.first_levels(2) == causal.first_levels(1) == shifted(5.0, 1000, 750, 500, 250)
    assert causal.first_levels(4) is None
    assert causvid.levels(causvid.steps) == shifted(1.0, 1000, 757, 522)
    assert causvid.levels(4) == shifted(8.0, 1000, 750, 500, 250)
    assert rolling.levels(5) == shifted(5.0, 1000, 800, 600, 400, 200)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shift_moves_the_levels(name):
    usual = FAMILIES[name]
    assert usual.shifted_levels(6, usual.shift) == pytest.approx(usual.levels(6))
    more = usual.shifted_levels(6, 2 * usual.shift)
    assert all(ours > theirs for ours, theirs in zip(more[1:-1], usual.levels(6)[1:-1], strict=True))


def test_skyreels_with_the_shift_for_images():
    assert FAMILIES["skyreels"].shifted_levels(50, 5.0) == pytest.approx(levels.skyreels(50, 5.0))


def test_an_unknown_family_is_told():
    with pytest.raises(UserError, match="expected one of demo"):
        family("sora")


def test_a_rule_that_watches_takes_the_familys_polynomial():
    teacache, even = Drift(0.2, whole_window=True), Every(2)
    small, large = (fitted(teacache, "skyreels", dim) for dim in (1536, 5120))
    assert small.rescale == POLYNOMIAL_1_3B and large.rescale == POLYNOMIAL_14B
    assert (small.whole_window, small.threshold, small.holds) == (True, 0.2, "residual")
    assert fitted(teacache, "demo", 256) == teacache and fitted(even, "skyreels", 1536) == even
