"""What several GPUs send one another at real size."""

import pytest

from flowcache_core.lab.real_size import MODELS
from flowcache_core.lab.traffic import ETHERNET, NVLINK, pipeline, shape_of, ulysses

SKYREELS = next(model for model in MODELS if model.name == "SkyReels-V2 1.3B")


def test_what_is_handed_on_is_a_chunks_tokens_once_a_stage():
    shape = shape_of(SKYREELS)
    pieces = shape.active * 2
    hop = 5 * 34 * 60 * 1536 * 2
    velocities = shape.active * 5 * 16 * 68 * 120 * 2
    assert pipeline(shape, 2).sent == pytest.approx((pieces + 1) * hop + velocities)


def test_two_gpus_take_a_branch_each_and_four_exchange_within_a_branch():
    shape = shape_of(SKYREELS)
    assert ulysses(shape, 2).sent == pytest.approx(shape.active * 5 * 16 * 68 * 120 * 2)  # velocities alone
    there, back = 6 * 3 * 1020, 6 * 1020  # heads of the other GPU, q, k and v; its tokens of this one's heads
    a_layer = 5 * (there + back) * 128 * 2
    assert ulysses(shape, 4).sent == pytest.approx(
        shape.active * (30 * a_layer + 5 * 1020 * 64 * 2 + 5 * 2040 * 64 * 2)
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.name} {model.size}")
def test_no_estimate_is_above_the_number_of_gpus(model):
    shape = shape_of(model)
    for scheme in (ulysses, pipeline):
        for gpus in (1, 2, 4, 8):
            speeds = [scheme(shape, gpus).speed(10.0, link) for link in (ETHERNET, NVLINK)]
            assert 0 < speeds[0] <= speeds[1] <= gpus + 1e-9
