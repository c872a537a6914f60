"""Quant-VideoGen (arXiv 2602.02958): keys and values of the whole history in 2 bits.

Tokens are grouped by k-means; what is left of a token without its group's mean is stored as -1, 0 or 1 times a scale,
one for 64 numbers. Source of the numbers: the code's defaults, one stage, symmetric. Its 256 means are of thousands of
tokens; here a chunk of 48 tokens has 4. Means and scales are not rounded to 16 and 8 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.build import RunSettings, build_engine
from ..engine.causal import CausalForward, CausalSite
from ..engine.loop import Engine
from ..history.cache import Chunk, History

MEANS, ROUNDS, BLOCK = 4, 20, 64


def grouped(x: Tensor) -> tuple[Tensor, Tensor]:
    """k-means of the tokens of each head, from tokens evenly spaced.

    Args:
        x: [B, heads, N, D].

    Returns:
        Means [B, heads, MEANS, D], and which one each token belongs to [B, heads, N].
    """
    count = x.shape[2]
    means = x[:, :, torch.linspace(0, count - 1, MEANS).long()].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(x, means).argmin(dim=-1)
        belongs = torch.nn.functional.one_hot(nearest, MEANS).to(x.dtype)  # [B, heads, N, MEANS]
        sizes = belongs.sum(dim=2)[..., None]
        fresh = torch.where(sizes > 0, belongs.mT @ x / sizes.clamp(min=1), means)
        if torch.equal(fresh, means):
            break
        means = fresh
    return means, nearest


def two_bits(x: Tensor) -> Tensor:
    """What [B, heads, N, D] is after packing and unpacking."""
    means, nearest = grouped(x)
    near = means.gather(2, nearest[..., None].expand_as(x))
    rest = (x - near).unflatten(-1, (-1, BLOCK))
    scale = rest.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    return near + ((rest / scale).round().clamp(-1, 1) * scale).flatten(-2)


class TwoBitHistory(History):
    """A history whose clean chunks are what 2 bits hold of them."""

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """Ends a forward, and rounds what has become clean."""
        start = self.clean
        super().commit(chunks)
        for layer in self.layers if self.clean > start else ():
            for part in layer:
                part.here[:, :, start : self.clean] = two_bits(part.here[:, :, start : self.clean])

    @property
    def bytes_used(self) -> int:
        """Of the clean chunks 2 bits a number, a byte a scale, 16-bit means and two bits a token for its group; of
        slots what they take."""
        plan, network = self.plan, self.plan.network
        heads, width = 2 * network.layers * plan.batch * network.kv_heads, network.head_dim
        token = width / 4 + width / BLOCK + 0.25
        means = self.clean / plan.chunk_tokens * MEANS * width * 2
        return int(heads * (self.clean * token + means + self._slot_tokens * width * self.dtype.itemsize))


class TwoBitForward(CausalForward):
    """A run over such a history."""

    def _history(self, site: CausalSite) -> History:
        settings = self.settings.history
        return TwoBitHistory(self.plan, site.positions, settings, self.dtype, self.keeps_slots, site.stream)


def two_bit_engine(run: RunSettings) -> Engine:
    """Makes a run over such a history."""
    return build_engine(run, TwoBitForward)
