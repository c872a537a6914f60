"""Rolling Sink: beside the newest chunk, a window holds the video's own beginning, walked to and fro for ever.

A model that was trained on five seconds drifts when its own late work is all that it sees. Its first frames are as good
as it can make them, so the window shows those, one chunk further at every chunk: forwards, then backwards in time, then
forwards again. Their positions go on with the video's, so that a chunk always sees what follows on without a gap.

Source: Rolling Sink, arXiv 2602.07775; haodong2000/RollingSink, wan/modules/causal_model.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .offload import OffloadableBuffer
from .plan import MemoryPlan


def walked(frame: int, length: int) -> int:
    """Which of the first `length` frames stands where frame `frame` of the video was."""
    turns, rest = divmod(frame, length)
    return length - 1 - rest if turns % 2 else rest


class Beginning:
    """Keys and values of a video's first frames, as many as a window keeps, in every layer.

    Args:
        plan: sizes of the run.
        buffer: makes room for one layer's keys or values, of so many tokens.

    Attributes:
        after: the frame of the video that follows them; None as long as the window is not full.
        layers: keys, without a turn in time, and values of each layer.
    """

    def __init__(self, plan: MemoryPlan, buffer: Callable[[int], OffloadableBuffer]):
        self.plan, self.tokens = plan, plan.beginning_tokens
        self.layers = [(buffer(self.tokens), buffer(self.tokens)) for _ in range(plan.network.layers)]
        self.after: int | None = None
        self._there = [False] * len(self.layers)

    def cut(self, layer: int, parts: Sequence[Tensor], end: int) -> list[Tensor]:
        """Makes what a layer's window holds from now on; the first cut of all gives the beginning.

        Args:
            parts: keys without a turn in time and values [B, heads, N, D], and the tokens' numbers in the video
                [B, heads, N], in time order, given frames apart.
            end: the frame of the video that follows them.

        Returns:
            The same of the tokens that stay: so many of the beginning, then the newest chunk.
        """
        keys, values, numbers = parts
        if not self._there[layer]:
            self._take(layer, keys, values, numbers)
        assert self.after is not None
        frame_tokens, length = self.plan.frame_tokens, self.tokens // self.plan.frame_tokens
        begun, last = self.after - length, end - self.plan.chunk_frames
        frames = [walked(frame - begun, length) for frame in range(end - length, last)]
        places = torch.tensor(frames, device=keys.device)[:, None] * frame_tokens
        chosen = (places + torch.arange(frame_tokens, device=keys.device)).flatten()
        made = [
            torch.cat([whole.read(0, self.tokens).index_select(2, chosen), now[:, :, -self.plan.chunk_tokens :]], dim=2)
            for whole, now in zip(self.layers[layer], (keys, values), strict=True)
        ]
        kept = torch.arange(
            (end - length) * frame_tokens, end * frame_tokens, dtype=numbers.dtype, device=numbers.device
        )
        return [*made, kept.expand(*numbers.shape[:2], -1)]

    def _take(self, layer: int, keys: Tensor, values: Tensor, numbers: Tensor) -> None:
        for whole, now in zip(self.layers[layer], (keys, values), strict=True):
            whole.write(0, now[:, :, : self.tokens])
        self._there[layer] = True
        if self.after is None:
            self.after = int(numbers[0, 0, self.tokens - 1]) // self.plan.frame_tokens + 1

    def numbers(self, like: Tensor) -> Tensor:
        """The numbers in the video of its tokens, for all layers alike: [layers, B, heads, tokens]."""
        assert self.after is not None
        last = self.after * self.plan.frame_tokens
        each = torch.arange(last - self.tokens, last, dtype=like.dtype, device=like.device)
        return each.expand(*like.shape[:3], -1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)
