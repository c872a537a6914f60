"""What backbones have in common that stand before another one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..history.cache import Attention
from .ranks import Replay


class WrappedBackbone:
    """Runs another backbone's parts; whatever is not said here is the other one's.

    Args:
        inner: a `models.wan.WanBackbone`, a `models.magi.network.MagiBackbone` or another of their kind.
    """

    layers: int

    def __init__(self, inner: Any):
        self.inner = inner
        self.layers = inner.layers
        self.replay = Replay()

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens [B, T, S, dim] of this process."""
        return self.inner.embed(x)

    def block(self, layer: int, x: Tensor, conditioning, attend: Attention) -> Tensor:
        """Runs one block over this process's tokens."""
        return self.inner.block(layer, x, conditioning, attend)

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Takes the blocks' input from their output, as the inner backbone does."""
        return self.inner.exact(hidden) - self.inner.exact(self.embed(x))

    def trunk(self, x: Tensor, sigma: Tensor, context, attend: Callable) -> Tensor:
        """As the inner backbone's, with this one's parts."""
        conditioning, hidden = self.inner.conditioning(x, sigma, [[context]]), self.embed(x)
        for layer in range(self.layers):
            hidden = self.block(layer, hidden, conditioning, partial(attend, layer))
        return self.residual(x, hidden)
