"""Which tokens of the clean history stay: importance x redundancy (FlowCache, arXiv 2602.10825, section on KV
compression).

All arithmetic is linear in the history's length, all heads together, and done in pieces, so that the extra memory stays
bounded. Ties are broken by age, the older token stays, which makes the choice deterministic.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..settings import Compression
from .products import wide_product


def importance(queries: Tensor, keys: Tensor, pool: int) -> Tensor:
    """Measures how much the queries look at each key.

    Softmax over the keys of q.k / sqrt(D), averaged over the queries, then max-pooled along the tokens. Query heads
    that share a key head are joined by the maximum of their logits before the softmax. Logits are rounded to the keys'
    dtype; over many queries that averages out.

    Args:
        queries: [B, query heads, Q, D], of the keys' dtype.
        keys: [B, key heads, N, D]; query heads are a multiple of key heads.

    Returns:
        float32 [B, key heads, N].
    """
    batch, heads, count, width = keys.shape
    group = queries.shape[1] // heads
    across = keys.flatten(0, 1).mT  # [B * heads, D, N]
    asked = (queries * width**-0.5).unflatten(1, (heads, group)).flatten(0, 1)  # [B * heads, group, Q, D]
    row_bytes = 2 * keys.itemsize * batch * heads * group * count  # logits of a query, and their softmax
    total = torch.zeros(batch * heads, count, device=keys.device)
    for part in asked.split(max(1, tile_bytes(keys.device) // row_bytes), dim=2):
        logits = part.flatten(1, 2) @ across
        if group > 1:
            logits = logits.unflatten(1, (group, -1)).amax(dim=1)
        total += logits.softmax(dim=-1).sum(dim=1, dtype=torch.float32)
    total = total.unflatten(0, (batch, heads)) / queries.shape[2]
    return F.max_pool1d(total, pool, stride=1, padding=pool // 2) if pool > 1 else total


def tile_bytes(device: torch.device) -> int:
    """Says how large the numbers of one piece of work may be: what a processor's cache holds, or a share of a GPU's
    memory, which is the same in every run; tensors without data stand for those of a card of 24 GB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    return 24 * 2**30 // 64 if device.type == "meta" else 8 * 2**20


def redundancy(keys: Tensor) -> Tensor:
    """Measures how alike each key is to all others: softmax over tokens of its mean cosine similarity to them.

    The mean over the others equals (k_i . sum_j k_j - 1) / N for unit keys, so no N x N matrix is needed.

    Args:
        keys: [B, heads, N, D].

    Returns:
        float32 [B, heads, N].
    """
    batch, heads, count, _ = keys.shape
    flat = keys.flatten(0, 1)
    scale = 1 / torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).clamp(min=1e-12)  # [B * heads, N]
    total = wide_product(scale[:, None].to(keys.dtype), flat).mT  # [B * heads, D, 1]
    similarity = wide_product(flat, total.to(keys.dtype))[..., 0] * scale
    return ((similarity - 1.0) / count).softmax(dim=-1).unflatten(0, (batch, heads))


def score(queries: Tensor, keys: Tensor, weight: float, pool: int) -> Tensor:
    """Weighs lambda * importance - (1 - lambda) * redundancy, float32 [B, key heads, N]; shapes as in `importance`."""
    return weight * importance(queries, keys, pool) - (1.0 - weight) * redundancy(keys)


def keep_best(scores: Tensor, keep: int, unit: int = 1) -> Tensor:
    """Finds the tokens with the highest scores, in time order.

    Args:
        scores: [B, heads, N].
        keep: how many tokens stay, a multiple of `unit`.
        unit: tokens that stay or go together (1, a frame's or a chunk's), by their mean score.

    Returns:
        int64 [B, heads, keep], ascending.
    """
    if unit > 1:
        scores = scores.unflatten(-1, (-1, unit)).mean(dim=-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    best = order[..., : keep // unit].sort(dim=-1).values
    if unit == 1:
        return best
    return (best[..., None] * unit + torch.arange(unit, device=best.device)).flatten(-2)


def asking_queries(settings: Compression, count: int) -> slice:
    """Says which of a chunk's `count` tokens ask at the next cut."""
    asked = settings.queries
    if not asked or asked >= count:
        return slice(None)
    if settings.asked_from == "last":
        return slice(count - asked, None)
    stride = count // asked
    return slice(stride // 2, stride // 2 + asked * stride, stride)


def sink_tokens(settings: Compression, keep: int, chunk_tokens: int) -> int:
    """Counts the tokens at the front that every cut leaves where they are, of `keep` that stay."""
    return chunk_tokens if settings.protect_first and keep > chunk_tokens else 0


def choose(
    settings: Compression,
    queries: Tensor | None,
    keys: Tensor,
    keep: int,
    frame_tokens: int,
    chunk_tokens: int,
    seed: int = 0,
) -> Tensor:
    """Chooses the clean tokens that stay.

    Args:
        queries: [B, query heads, Q, D] of the chunk that asks, for the "flowcache" rule; None where the history comes
            from a run without a budget, which keeps none: then redundancy alone decides.
        keys: [B, key heads, N, D], the clean history in time order.
        keep: how many tokens stay, a whole number of chunks and less than N.
        frame_tokens, chunk_tokens: tokens of a frame and of a chunk.
        seed: of the "random" rule.

    Returns:
        Indices, int64 [B, key heads, keep], ascending.

    Raises:
        UserError: more chunks are protected than stay.
    """
    batch, heads, count, _ = keys.shape
    head = sink_tokens(settings, keep, chunk_tokens)
    tail = chunk_tokens if settings.protect_newest else 0
    free = keep - head - tail
    if free < 0:
        raise UserError(
            f"The history keeps {keep // chunk_tokens} clean chunks, but {settings.protected_chunks} of them are "
            "protected; raise the budget or protect fewer."
        )
    unit = {"token": 1, "frame": frame_tokens, "chunk": chunk_tokens}[settings.granularity]
    middle = keys[:, :, head : count - tail]
    if settings.rule == "window":
        best = torch.arange(middle.shape[2] - free, middle.shape[2], device=keys.device).expand(batch, heads, free)
    elif settings.rule == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(batch, heads, middle.shape[2], generator=generator).to(keys.device)
        best = keep_best(scores, free, unit)
    elif queries is None:
        best = keep_best(-redundancy(middle), free, unit)
    else:
        asked = queries[:, :, asking_queries(settings, queries.shape[2])]
        best = keep_best(score(asked, middle, settings.weight, settings.pool), free, unit)
    fixed = torch.arange(count, device=keys.device).expand(batch, heads, count)
    return torch.cat([fixed[..., :head], best + head, fixed[..., count - tail :]], dim=-1)


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
        New tensors with the `keep` tokens but those of the sink, for each part.
    """
    kept = choose(compression, queries, keys, keep, frame_tokens, chunk_tokens, seed=layer)
    kept = kept[..., sink_tokens(compression, keep, chunk_tokens) :]
    wide = kept[..., None].expand(*kept.shape, keys.shape[-1])
    return [part.gather(2, kept if part.ndim == 3 else wide) for part in parts]
