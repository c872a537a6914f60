"""Each process takes some of every frame's tokens through the network, and the history of some attention heads.

Around attention they exchange: queries, keys and values of all tokens for a process's heads; then attended values of
all heads for its tokens. So weights are used for 1/P of the tokens, and each process's history is 1/P.

Source of the scheme: DeepSpeed-Ulysses (arXiv 2309.14509); groups where heads are too few: USP (arXiv 2405.07719).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..history.cache import Attention
from ..history.plan import NetworkSizes
from .heads import HeadScheme, head_scheme
from .ranks import Ranks, shares
from .wrapped import WrappedBackbone


class UlyssesBackbone(WrappedBackbone):
    """Runs this process's part of a network.

    Args:
        inner: runs the whole network.
        ranks: the processes; all of them run the same steps in the same order.

    Attributes:
        scheme: of the heads.
    """

    def __init__(self, inner: Any, ranks: Ranks):
        super().__init__(inner)
        sizes: NetworkSizes = inner.sizes
        self.ranks, self.scheme = ranks, head_scheme(sizes.kv_heads, ranks.size)
        self.asked = sizes.heads // sizes.kv_heads  # query heads of a key head
        self.places: list[range] = []  # of a frame's tokens, by process

    @property
    def sizes(self) -> NetworkSizes:
        """Of this process's part: its heads, and 1/P of the tokens inside the blocks."""
        return sizes_of_part(self.inner.sizes, self.scheme, self.ranks.rank)

    def embed(self, x: Tensor) -> Tensor:
        """Makes this process's tokens [B, T, S', dim] of a latent [B, C, T, H, W] that every process has.

        Raises:
            UserError: a frame has fewer tokens than there are processes.
        """
        tokens = self.inner.embed(x)
        if tokens.shape[2] < self.ranks.size:
            raise UserError(
                f"A frame has {tokens.shape[2]} tokens, too few for {self.ranks.size} processes; take fewer of them."
            )
        self.places = shares(tokens.shape[2], self.ranks.size)
        mine = self.places[self.ranks.rank]
        return tokens[:, :, mine.start : mine.stop].contiguous()

    def block(self, layer: int, x: Tensor, conditioning, attend: Attention) -> Tensor:
        """Runs one block over this process's tokens; `attend` gets its heads, and all tokens."""
        with self.replay:
            return self.inner.block(layer, x, conditioning, partial(self._attended, attend))

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the whole velocity [B, C, T, H, W], the same bits in every process."""
        mine = self.inner.exact(self.embed(x))
        with self.replay:

            def gathered() -> list[Tensor]:
                part = self.inner.patches_of(x, sigma, mine + residual)
                batch, frames, _, width = part.shape
                return self.ranks.gather(part, [(batch, frames, len(places), width) for places in self.places])

            return self.inner.velocity(x, torch.cat(self.replay.once(gathered), dim=2))

    def attention_over(self, attention: Attention) -> Attention:
        """What attends to the history: `attention`, for the queries that this process takes of its group."""
        if self.scheme.group == 1:
            return attention
        return partial(self._some_queries, attention)

    def _some_queries(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = sum(map(len, self.places))
        chosen = torch.cat(
            [
                torch.arange(self.places[rank].start, self.places[rank].stop)
                for rank in self.scheme.asks_for(self.ranks.rank)
            ]
        ).to(q.device)
        asking = q.unflatten(2, (-1, whole))
        answer = attention(asking.index_select(3, chosen).flatten(2, 3), k, v)
        filled = torch.zeros_like(asking)  # nobody takes the rest from here
        filled[:, :, :, chosen] = answer.unflatten(2, (-1, len(chosen)))
        return filled.flatten(2, 3)

    def _attended(self, attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, _, tokens, width = q.shape
        frames = tokens // len(self.places[self.ranks.rank])
        if not self.replay.ahead:
            parts = self.replay.once(lambda: self._to_heads(q, k, v, frames))
            q, k, v = self._joined_tokens(parts, frames)
        else:
            self.replay.skip()
        answers = self.replay.once(lambda: self._to_tokens(attend(q, k, v), frames))
        mine = len(self.places[self.ranks.rank])
        whole = torch.cat([part.view(rows, -1, frames, mine, width) for part in answers if part.numel()], dim=1)
        return whole.flatten(2, 3)

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> list[Tensor]:
        """Sends each process its heads of this one's tokens; gets this one's heads of theirs: [rows, q, k and v heads,
        tokens, D]."""
        parts = []
        for rank in range(self.ranks.size):
            held = self.scheme.of(rank)
            first, last = held.start, held.stop
            parts.append(
                torch.cat([q[:, first * self.asked : last * self.asked], k[:, first:last], v[:, first:last]], 1)
            )
        count = len(self.scheme.of(self.ranks.rank)) * (self.asked + 2)
        rows, _, _, width = q.shape
        return self.ranks.exchange(parts, [(rows, count, frames * len(places), width) for places in self.places])

    def _joined_tokens(self, parts: Sequence[Tensor], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of all processes in their order in the frames, apart as q, k, v."""
        whole = torch.cat([part.unflatten(2, (frames, -1)) for part in parts], dim=3).flatten(2, 3)
        held = len(self.scheme.of(self.ranks.rank))
        q, k, v = whole.split([held * self.asked, held, held], dim=1)
        return q, k, v

    def _to_tokens(self, answer: Tensor, frames: int) -> list[Tensor]:
        """Sends each process the attended values of its tokens; gets this one's, by heads."""
        rows, heads, _, width = answer.shape
        frame = answer.unflatten(2, (frames, -1))
        mine, asks = len(self.places[self.ranks.rank]), self.scheme.asks_for(self.ranks.rank)
        parts = [
            frame[:, :, :, places.start : places.stop] if rank in asks else frame[:, :0, :, :0]
            for rank, places in enumerate(self.places)
        ]
        answering = self.scheme.answers(self.ranks.rank)
        shapes = [
            (rows, len(self.scheme.of(rank)) * self.asked, frames, mine, width) if rank in answering else (0,)
            for rank in range(self.ranks.size)
        ]
        return self.ranks.exchange(parts, shapes)


def sizes_of_part(sizes: NetworkSizes, scheme: HeadScheme, rank: int) -> NetworkSizes:
    """What of a network's sizes a process has: its heads, and 1/P of the tokens inside the blocks."""
    held = len(scheme.of(rank))
    return replace(
        sizes,
        heads=held * (sizes.heads // sizes.kv_heads),
        kv_heads=held,
        dim=-(-sizes.dim // scheme.ranks),
        inside=-(-sizes.inside // scheme.ranks),
    )


def layer_numbers(scheme: HeadScheme, places: Sequence[range], rank: int, asked: int, width: int, tokens: int) -> int:
    """Counts the numbers that a process sends in one layer, for frames of one token a place.

    Args:
        places: of a frame's tokens, by process.
        asked: query heads of a key head.
        width: of a head.
        tokens: rows times frames, each of the places counted.
    """
    others = [other for other in range(scheme.ranks) if other != rank]
    there = sum(len(scheme.of(other)) for other in others) * (asked + 2) * len(places[rank])
    back = sum(len(places[other]) for other in others if other in scheme.asks_for(rank)) * len(scheme.of(rank)) * asked
    return (there + back) * width * tokens
