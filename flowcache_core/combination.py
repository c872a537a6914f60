"""Weighted sums of tensors, and the weights of values at some places in the polynomial through them."""

import math
from collections.abc import Sequence

from torch import Tensor


def lagrange(steps: Sequence[int], at: int) -> list[float]:
    """Weights of values at some steps in the polynomial through them, at another step; they add up to 1."""
    return [math.prod((at - other) / (mine - other) for other in steps if other != mine) for mine in steps]


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum, in a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total
