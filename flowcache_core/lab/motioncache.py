"""MotionCache's rule: each token is reused by itself, the longer the less it moves.

The change of a chunk's input from step to step is added up for every token, weighed by how much the network's answer
for the token differs from the frame before, over the mean of its frame. A token whose sum reaches the threshold is
recomputed. The first few times that happens all tokens weigh the same (the rule's phase 1).

Source: MotionCache (arXiv 2605.01725), its code for SkyReels-V2. There only the chosen tokens go through the network,
and see the others' keys as they were; here the whole chunk is run and only the chosen tokens take the result, which
can but be better. The work that is counted is theirs. The change is that of the latent's embedding, as for FlowCache's
rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.build import RunSettings
from ..engine.causal import CausalForward
from ..engine.forward import Step, Velocity
from ..engine.loop import Engine
from ..reuse.policies import relative_change
from ..schedule import Given
from .wrapped import WrappedForward, wrapped_engine

WARMUP, ALIKE = 5, 3  # first steps of a chunk; times that tokens are recomputed before their motion counts
PATCH = 2  # latent pixels of a token


@dataclass
class Tokens:
    """What is known of a chunk.

    Attributes:
        signal: of its last step.
        answer: guided velocity, every token's as it was last recomputed, [B, C, T, H, W].
        sums: of the weighed changes of each token, [B, T, h, w].
        times: how often tokens were recomputed after the warm-up.
    """

    signal: Tensor
    answer: Velocity
    sums: Tensor
    times: int = 0


class MotionCacheForward(WrappedForward):
    """Another forward under MotionCache's rule.

    Args:
        inner: runs the network.
        threshold: summed change at which a token is recomputed.

    Attributes:
        work: forwards over one chunk, of a part of it so much of one.
    """

    def __init__(self, inner: CausalForward, threshold: float):
        super().__init__(inner)
        self.threshold, self.work = threshold, 0.0
        self.known: dict[int | Given, Tokens] = {}

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the network for the steps of which a token is to be recomputed; the other tokens keep their answer."""
        signals = self.inner.signals(steps)
        chosen = [self._chosen(step, signal) for step, signal in zip(steps, signals, strict=True)]
        asked = [step for step, tokens in zip(steps, chosen, strict=True) if tokens.any()]
        fresh = iter(self.inner.velocities(asked) if asked else [])
        return [
            self._mixed(step, signal, tokens, next(fresh) if tokens.any() else None)
            for step, signal, tokens in zip(steps, signals, chosen, strict=True)
        ]

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk."""
        self.known.pop(chunk, None)
        self.work += 1  # its clean pass
        self.inner.finish(chunk, latent)

    def _chosen(self, step: Step, signal: Tensor) -> Tensor:
        """Which tokens are recomputed, bool [B, T, h, w]."""
        batch, _, frames, height, width = step.x.shape
        every = torch.ones(batch, frames, height // PATCH, width // PATCH, dtype=torch.bool)
        known = self.known.get(step.place.chunk)
        assert step.place.step is not None
        if known is None or step.place.step <= WARMUP:
            return every
        changes = [relative_change([now], [before])[0] for now, before in zip(signal, known.signal, strict=True)]
        known.sums = known.sums + torch.tensor(changes).view(-1, 1, 1, 1) * self._weights(known)
        return known.sums >= self.threshold

    @staticmethod
    def _weights(known: Tokens) -> Tensor:
        """How much each token moves, over the mean of its frame, [B, T, h, w]; the first frame as the second."""
        if known.times < ALIKE:
            return torch.ones_like(known.sums)
        answer = known.answer.value
        size = F.avg_pool3d(answer.abs().mean(dim=1, keepdim=True), (1, PATCH, PATCH))[:, 0]
        moved = (answer[:, :, 1:] - answer[:, :, :-1]).abs().mean(dim=1, keepdim=True)
        parts = F.avg_pool3d(moved, (1, PATCH, PATCH))[:, 0] / (size[:, :-1] + 1e-8)
        weights = torch.cat([parts[:, :1], parts], dim=1)
        return weights / (weights.mean(dim=(2, 3), keepdim=True) + 1e-8)

    def _mixed(self, step: Step, signal: Tensor, tokens: Tensor, fresh: Velocity | None) -> Velocity:
        chunk, known = step.place.chunk, self.known.get(step.place.chunk)
        if fresh is None:
            assert known is not None  # a chunk that is not has all of its tokens chosen
            known.signal = signal
            return Velocity(known.answer.value, known.answer.branches, recomputed=False)
        self.work += tokens.float().mean().item()
        if known is None:
            self.known[chunk] = Tokens(signal, fresh, torch.zeros(tokens.shape))
            return fresh
        pixels = tokens.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3)[:, None]
        known.answer = Velocity(torch.where(pixels, fresh.value, known.answer.value), fresh.branches, recomputed=True)
        known.signal, known.sums = signal, known.sums.masked_fill(tokens, 0.0)
        assert step.place.step is not None
        known.times += step.place.step > WARMUP
        return known.answer


def motioncache_engine(
    run: RunSettings, make: Callable[..., CausalForward] = CausalForward, *, threshold: float
) -> Engine:
    """Makes a run over a history under MotionCache's rule."""
    return wrapped_engine(run, make, lambda inner: MotionCacheForward(inner, threshold))
