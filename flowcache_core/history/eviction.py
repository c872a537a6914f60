"""What a history over its budget lets go."""

from collections.abc import Sequence

from torch import Tensor

from ..settings import Compression
from .compression import choose


def evict(
    compression: Compression,
    keys: Tensor,
    parts: Sequence[Tensor],
    queries: Tensor | None,
    keep: int,
    frame_tokens: int,
    chunk_tokens: int,
    layer: int,
) -> list[Tensor]:
    """Chooses `keep` tokens of one layer and gathers what is stored of them.

    Args:
        compression: how to choose.
        keys: [B, heads, N, D], as they are attended to.
        parts: [B, heads, N] or [B, heads, N, D], what is stored of the same tokens.
        queries: [B, query heads, Q, D] of the chunk that asks, or None.
        layer: its number.

    Returns:
        New tensors with `keep` tokens, for each part.
    """
    kept = choose(compression, queries, keys, keep, frame_tokens, chunk_tokens, seed=layer)

    def gathered(part: Tensor) -> Tensor:
        index = kept if part.ndim == 3 else kept[..., None].expand(*kept.shape, part.shape[-1])
        return part.gather(2, index)

    return [gathered(part) for part in parts]
