"""One forward of one chunk over its history."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.rotary import rotate
from ..schedule import END

if TYPE_CHECKING:
    from .cache import History

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class ChunkView:
    """Writes an active chunk's keys and values and attends.

    Args:
        history: of the branch.
        chunk: an active chunk, or a given end.
        visible: how many of the chunks before it may be seen; None for all.
    """

    def __init__(self, history: "History", chunk: int, visible: int | None):
        self.history = history
        self.start, self.end = history.slot(chunk)
        self.first, self.last = 0 if history.sees_end(chunk) else history.shape.end_tokens, self.end
        if visible is not None:
            self.first = max(self.first, self.start - visible * history.shape.chunk_tokens)
        if chunk == END:
            self.first, self.last = 0, history.clean
        self.table = history.table(chunk)
        self.asks = history.asks(chunk)
        if self.asks and not history.queries:
            history.queries = [torch.empty(0)] * history.shape.layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: AttentionFunction) -> Tensor:
        """Unrotated q, k, v [B, heads, chunk tokens, D] to attended values of q's shape."""
        history = self.history
        keys, values, unrotated = history.layers[layer]
        q = rotate(q, self.table)
        history.fetch_after(layer)
        keys.write(self.start, rotate(k, self.table))
        values.write(self.start, v)
        if unrotated is not None:
            unrotated.write(self.start, k[..., : history.time_dims])
        if self.asks:
            last = history.settings.compression.queries
            history.queries[layer] = q[:, :, -last:].contiguous().to(history.queries_at)
        return attention(q, keys.read(self.first, self.last), values.read(self.first, self.last))
