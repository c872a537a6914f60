"""Weighted sums of tensors, and the weights of values at some places in the polynomial through them."""

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor


@lru_cache(4096)
def lagrange(steps: tuple[int, ...], at: float) -> tuple[float, ...]:
    """Weights of values at some steps in the polynomial through them, at another step; they add up to 1."""
    return tuple(math.prod((at - other) / (mine - other) for other in steps if other != mine) for mine in steps)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, in a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total
