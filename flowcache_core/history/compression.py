"""Which tokens of the clean history stay: importance x redundancy (FlowCache, arXiv 2602.10825, section on KV
compression).

All arithmetic is linear in the history's length, all heads together, and done in pieces, so that the extra memory stays
bounded. Ties are broken by age, the older token stays, which makes the choice deterministic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..settings import Compression
from ..solvers.weights import weighted
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
    asked = queries.unflatten(1, (heads, group)).flatten(0, 1)  # [B * heads, group, Q, D]
    row_bytes = 2 * keys.itemsize * batch * heads * group * count  # logits of a query, and their softmax
    means, weights = [], []
    for part in asked.split(max(1, tile_bytes(keys.device) // row_bytes), dim=2):
        logits = torch.baddbmm(part.new_empty(1, 1, 1), part.flatten(1, 2), across, beta=0, alpha=width**-0.5)
        if group > 1:
            logits = logits.unflatten(1, (group, -1)).amax(dim=1)
        means.append(logits.softmax(dim=-1).mean(dim=1, dtype=torch.float32))
        weights.append(part.shape[2] / queries.shape[2])
    mean = weighted(means, weights).unflatten(0, (batch, heads))
    return F.max_pool1d(mean, pool, stride=1, padding=pool // 2) if pool > 1 else mean


def tile_bytes(device: torch.device) -> int:
    """Says how large the numbers of one piece of work may be: what a processor's cache holds, or a share of a GPU's
    memory, which is the same in every run; tensors without data stand for those of a card of 24 GB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    return 24 * 2**30 // 64 if device.type == "meta" else 8 * 2**20


def redundancy(keys: Tensor) -> Tensor:
    """Measures how alike each key is to all others: softmax over tokens of its mean cosine similarity to them.

    The mean over the others equals (k_i . sum_j k_j - 1) / N for unit keys, so no N x N matrix is needed. The 1 makes
    no difference to the softmax.

    Args:
        keys: [B, heads, N, D].

    Returns:
        float32 [B, heads, N].
    """
    batch, heads, count, _ = keys.shape
    flat = keys.flatten(0, 1)
    scale = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).clamp(min=1e-12).reciprocal()  # [B * heads, N]
    total = wide_product(scale[:, None].to(keys.dtype), flat).mT  # [B * heads, D, 1]
    similarity = wide_product(flat, total.to(keys.dtype))[..., 0] * scale
    return (similarity / count).softmax(dim=-1).unflatten(0, (batch, heads))


def score(queries: Tensor, keys: Tensor, weight: float, pool: int) -> Tensor:
    """Weighs lambda * importance - (1 - lambda) * redundancy, float32 [B, key heads, N], divided by lambda where that
    is not 0; shapes as in `importance`."""
    alike = redundancy(keys)
    return torch.sub(importance(queries, keys, pool), alike, alpha=(1.0 - weight) / weight) if weight else -alike


def best_units(scores: Tensor, count: int, unit: int = 1) -> Tensor:
    """Finds the units of tokens with the highest scores, in time order.

    Args:
        scores: [B, heads, N].
        count: how many units stay.
        unit: tokens that stay or go together (1, a frame's or a chunk's), by their mean score.

    Returns:
        int64 [B, heads, count], ascending.
    """
    if unit > 1:
        scores = scores.unflatten(-1, (-1, unit)).mean(dim=-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def asking_queries(settings: Compression, count: int) -> slice:
    """Says which of a chunk's `count` tokens ask at the next cut."""
    asked = settings.queries
    if not asked or asked >= count:
        return slice(None)
    if settings.asked_from == "last":
        return slice(count - asked, None)
    stride = count // asked
    return slice(stride // 2, stride // 2 + asked * stride, stride)


def sink_tokens(settings: Compression, keep: int, frame_tokens: int, chunk_tokens: int) -> int:
    """Counts the tokens at the front that every cut leaves where they are, of `keep` that stay."""
    if settings.sink is not None:
        return settings.sink * frame_tokens
    return chunk_tokens if settings.protect_first and keep > chunk_tokens else 0


class Choice(NamedTuple):
    """Which clean tokens stay: all of the sink, some units of the middle, all of the tail.

    Attributes:
        sink, tail: tokens at the front and at the end.
        unit: tokens that stay or go together.
        units: those of the middle that stay, int64 [B, key heads, kept], ascending.
    """

    sink: int
    tail: int
    unit: int
    units: Tensor

    def tokens(self, count: int) -> Tensor:
        """Numbers of the tokens that stay of so many, int64 [B, key heads, kept], ascending."""
        numbers = torch.arange(count, device=self.units.device).expand(*self.units.shape[:2], count)
        return torch.cat([numbers[..., : self.sink], self.after_sink(numbers)], dim=2)

    def after_sink(self, part: Tensor) -> Tensor:
        """What stays of a part [B, heads, N] or [B, heads, N, D], but for the sink."""
        end = part.shape[2] - self.tail
        middle = part[:, :, self.sink : end].unflatten(2, (-1, self.unit))
        places = self.units.view(*self.units.shape, *[1] * (middle.ndim - 3))
        kept = middle.gather(2, places.expand(*self.units.shape, *middle.shape[3:])).flatten(2, 3)
        return torch.cat([kept, part[:, :, end:]], dim=2) if self.tail else kept


def choose(
    settings: Compression,
    queries: Tensor | None,
    keys: Tensor,
    keep: int,
    frame_tokens: int,
    chunk_tokens: int,
    seed: int = 0,
    stays: Tensor | None = None,
) -> Choice:
    """Chooses the clean tokens that stay.

    Args:
        queries: [B, query heads, Q, D] of the chunk that asks, for the "flowcache" rule; None where the history comes
            from a run without a budget, which keeps none: then redundancy alone decides.
        keys: [B, key heads, N, D], the clean history in time order.
        keep: how many tokens stay, a whole number of frames and less than N.
        frame_tokens, chunk_tokens: tokens of a frame and of a chunk.
        seed: of the "random" rule.
        stays: bool [B, key heads, N], tokens of whole frames that the "window" rule keeps before newer ones.

    Raises:
        UserError: more chunks are protected than stay.
    """
    batch, heads, count, _ = keys.shape
    sink = sink_tokens(settings, keep, frame_tokens, chunk_tokens)
    tail = chunk_tokens if settings.protect_newest else 0
    free = keep - sink - tail
    if free < 0:
        raise UserError(
            f"The history keeps {keep // chunk_tokens} clean chunks, but {settings.protected_chunks} of them are "
            "protected; raise the budget or protect fewer."
        )
    unit = {"token": 1, "frame": frame_tokens, "chunk": chunk_tokens}[settings.granularity]
    if settings.rule == "window":
        unit = frame_tokens  # what is newest is so in any unit
    middle, kept = keys[:, :, sink : count - tail], free // unit
    if settings.rule == "window":
        all_units = middle.shape[2] // unit
        if stays is not None:
            older = all_units * stays[:, :, sink : count - tail : unit]
            return Choice(sink, tail, unit, best_units(older + torch.arange(all_units, device=keys.device), kept))
        newest = torch.arange(all_units - kept, all_units, device=keys.device).expand(batch, heads, kept)
        return Choice(sink, tail, unit, newest)
    if settings.rule == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(batch, heads, middle.shape[2], generator=generator, dtype=torch.float32, device="cpu")
        scores = scores.to(keys.device)
    elif queries is None:
        scores = -redundancy(middle)
    else:
        asked = queries[:, :, asking_queries(settings, queries.shape[2])]
        scores = score(asked, middle, settings.weight, settings.pool)
    return Choice(sink, tail, unit, best_units(scores, kept, unit))


def blended_sink(settings: Compression, sink: int, keep: int, parts: Sequence[Tensor]) -> list[Tensor]:
    """Mixes the tokens that the "window" rule drops into those of the sink, oldest first.

    Source: daydreamlive/scope, pipelines/reward_forcing/modules/causal_model.py, `incremental_update`.

    Args:
        sink, keep: tokens of the sink, and of all that stays; a multiple of it more are there.
        parts: keys and values [B, heads, N, D] without a turn in time, then token numbers [B, heads, N], which stay.

    Returns:
        The sink's part of each.
    """
    keys, values, numbers = parts
    dropped = keys.shape[2] - keep
    mixed = []
    for part in (keys, values):
        now = part[:, :, :sink]
        for old in part[:, :, sink : sink + dropped].split(sink, dim=2):
            now = torch.lerp(old.float(), now.float(), settings.sink_share).to(part.dtype)
        mixed.append(now)
    return [*mixed, numbers[:, :, :sink]]


def evict(
    compression: Compression,
    keys: Tensor,
    parts: Sequence[Tensor],
    queries: Tensor | None,
    keep: int,
    frame_tokens: int,
    chunk_tokens: int,
    layer: int,
    stays: Tensor | None = None,
) -> list[Tensor]:
    """Chooses `keep` tokens of one layer and gathers what is stored of them.

    Args:
        compression: how to choose.
        keys: [B, heads, N, D], as they are attended to.
        parts: [B, heads, N] or [B, heads, N, D], what is stored of the same tokens.
        queries: [B, query heads, Q, D] of the chunk that asks, or None.
        layer: its number.
        stays: as for `choose`.

    Returns:
        New tensors with the `keep` tokens but those of the sink, for each part.
    """
    choice = choose(compression, queries, keys, keep, frame_tokens, chunk_tokens, seed=layer, stays=stays)
    return [choice.after_sink(part) for part in parts]
