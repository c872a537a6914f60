"""The clean part of a history, as it is kept beyond a run: in a state, in the folder of a run."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .compression import choose
from .settings import HistorySettings, HistoryShape


class Clean(NamedTuple):
    """The clean part of one branch's history, on the CPU.

    Attributes:
        keys, values: [layers, B, heads, tokens, D]; keys are rotated by their place in the video.
        tokens: [layers, B, heads, tokens] number of each token in the video.
        queries: [layers, B, query heads, Q, D] for the next compression, or an empty tensor.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    queries: Tensor


class Grown(NamedTuple):
    """What clean histories have grown by since they were last looked at.

    Attributes:
        histories: of each branch, its new tokens; or all of them.
        whole: all, because older ones were dropped since, or nothing was looked at before.
    """

    histories: dict[Hashable, Clean]
    whole: bool


def cut_to(keep: int, saved: Clean, lead: int, settings: HistorySettings, shape: HistoryShape) -> Clean:
    """The `keep` tokens that stay beside the first `lead` ones."""
    layers = []
    for layer in range(shape.layers):
        queries = saved.queries[layer] if len(saved.queries) else None
        kept = choose_tokens(settings, shape, saved.keys[layer, :, :, lead:], queries, keep, layer) + lead
        kept = torch.cat([torch.arange(lead).expand(*kept.shape[:2], lead), kept], dim=2)
        layers.append([gather(part[layer], kept) for part in saved[:3]])
    keys, values, tokens = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return Clean(keys, values, tokens, saved.queries)


def choose_tokens(
    settings: HistorySettings, shape: HistoryShape, keys: Tensor, queries: Tensor | None, keep: int, layer: int
) -> Tensor:
    """Indices [B, heads, keep] of the tokens of one layer that stay; see `compression.choose`."""
    return choose(settings.compression, queries, keys, keep, shape.frame_tokens, shape.chunk_tokens, seed=layer)


def gather(part: Tensor, kept: Tensor) -> Tensor:
    """Tokens `kept` [B, heads, keep] of a part [B, heads, tokens] or [B, heads, tokens, D]."""
    index = kept if part.ndim == 3 else kept[..., None].expand(*kept.shape, part.shape[-1])
    return part.gather(2, index)
