"""Sums and joins of tensors, and the weights of values at some places in the polynomial through them."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(4096)
def lagrange(steps: tuple[int, ...], at: float) -> tuple[float, ...]:
    """Gives the weights of values at some steps in the polynomial through them, at another step; they add up to 1."""
    return tuple(math.prod((at - other) / (mine - other) for other in steps if other != mine) for mine in steps)


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Puts the parts behind one another; a single one is given back as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def joined_heads(answers: list[Tensor], dim: int = 0) -> Tensor:
    """Puts attended values [B, heads, tokens, D] behind one another, in the batch (dim 0) or in the tokens (2). In
    memory tokens come before heads, so that heads are joined without a copy."""
    if len(answers) == 1:
        return answers[0]
    return torch.cat([answer.transpose(1, 2) for answer in answers], dim // 2).transpose(1, 2)


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Gives the weighted sum. What has weight 0 is left out, and what alone has weight 1 is given back as it is."""
    (total, first), *rest = [pair for pair in zip(tensors, weights, strict=True) if pair[1]]
    if first == 1.0:
        if not rest:
            return total
        (tensor, weight), *rest = rest
        total = torch.add(total, tensor, alpha=weight)
    else:
        total = total * first
    for tensor, weight in rest:
        total.add_(tensor, alpha=weight)
    return total
