"""The clean part of a history, as it is kept beyond a run: in a state, in the folder of a run."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import Compression
from .eviction import evict


class Snapshot(NamedTuple):
    """The clean part of one branch's history, on the CPU.

    Attributes:
        keys, values: [layers, B, heads, tokens, D]; keys are rotated by their place in the video.
        tokens: [layers, B, heads, tokens] number of each token in the video.
        queries: [layers, B, query heads, Q, D] for the next cut, or an empty tensor.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    queries: Tensor


class SnapshotDelta(NamedTuple):
    """What the clean histories have grown by since they were last looked at.

    Attributes:
        histories: of each branch, its new tokens; or all of them.
        full: all, because older ones were dropped since, or nothing was looked at before.
    """

    histories: dict[Hashable, Snapshot]
    full: bool


def cut_to(
    keep: int, saved: Snapshot, lead: int, compression: Compression, frame_tokens: int, chunk_tokens: int
) -> Snapshot:
    """Cuts a snapshot to `keep` tokens beside the first `lead` ones."""
    layers = []
    for layer, parts in enumerate(zip(*saved[:3], strict=True)):
        queries = saved.queries[layer] if len(saved.queries) else None
        rest = [part[:, :, lead:] for part in parts]
        kept = evict(compression, rest[0], rest, queries, keep, frame_tokens, chunk_tokens, layer)
        layers.append([torch.cat([part[:, :, :lead], new], dim=2) for part, new in zip(parts, kept, strict=True)])
    keys, values, tokens = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return Snapshot(keys, values, tokens, saved.queries)
