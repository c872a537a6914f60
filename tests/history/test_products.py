"""Products of 16-bit numbers with float32 results."""

import pytest
import torch

from flowcache_core.history.compression import importance, redundancy
from flowcache_core.history.products import wide_product
from tests.history.test_compression import draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_float32_whatever_the_inputs_are(dtype):
    a, b = draw(3, 5, 700).to(dtype), draw(3, 700, 4, seed=1).to(dtype)
    found = wide_product(a, b)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), a.double() @ b.double(), atol=1e-3)


def test_scores_of_16_bit_keys_rank_as_those_of_float32():
    """What is kept is decided by means over frames: these differ by far more than 16 bits round."""
    keys, queries = draw(1, 4, 20 * 64, 32), 3 * draw(1, 4, 64, 32, seed=1)
    for score in (redundancy, lambda keys: importance(queries.to(keys.dtype), keys, 7)):
        exact, rounded = (score(given).unflatten(-1, (20, 64)).mean(dim=-1) for given in (keys, keys.bfloat16()))
        spread = exact.std(dim=-1).min()
        assert (exact - rounded).abs().max() < 0.05 * spread
