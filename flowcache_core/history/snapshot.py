"""The clean part of a history, as it is kept beyond a run: in a state, in the folder of a run."""

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from ..schedule import Shot


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
        shown: stands for the texts that they were computed for, where that is known.
        shot: that the newest chunk is in.
    """

    histories: dict[Hashable, Snapshot]
    full: bool
    shown: str = ""
    shot: Shot = Shot()
