"""EasyCache's rule as ComfyUI applies it: one decision for the whole latent, from how strongly it has answered so far.

The output of a recomputed step changed by so much for so much change of the input; with that rate, the change of the
input since the last recomputed step predicts the output's, in parts of its size. The predictions are added up, and the
sum decides. A step that is not recomputed gives the input plus the last difference between output and input.

Source: ComfyUI, comfy_extras/nodes_easycache.py (EasyCache, arXiv 2507.02860). The host starts it at 15% of the noise
levels and looks at every 8th row and column; here it starts as soon as it can, which lets it reach higher speeds, and
sees every value.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.build import RunSettings
from ..engine.causal import CausalForward
from ..engine.forward import Forward, Step, Velocity
from ..engine.loop import Engine
from ..schedule import Given
from .wrapped import WrappedForward, wrapped_engine


class Seen(NamedTuple):
    """Input and guided velocity of a chunk's last recomputed step, [B, C, T, H, W]."""

    x: Tensor
    answer: Velocity


class EasyCacheForward(WrappedForward):
    """Another forward under EasyCache's rule; the window is the latent of all active chunks.

    Args:
        inner: runs the network.
        threshold: predicted change of the output, added up, at which to recompute.
    """

    def __init__(self, inner: Forward, threshold: float):
        super().__init__(inner)
        self.threshold = threshold
        self.seen: dict[int | Given, Seen] = {}
        self.rate: float | None = None  # change of the output over change of the input
        self.drift = 0.0

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the network for all steps, or for those of chunks that begin; the others take their last answer again,
        moved as far as their latent has."""
        again = self._decide(steps)
        asked = [step for step in steps if again or step.place.chunk not in self.seen]
        fresh = dict(
            zip((step.place.chunk for step in asked), self.inner.velocities(asked) if asked else [], strict=True)
        )
        answers = [fresh.get(step.place.chunk) or self._moved(step) for step in steps]
        self._learn([(step, fresh[step.place.chunk]) for step in asked])
        return answers

    def _decide(self, steps: Sequence[Step]) -> bool:
        known = [(step.x, self.seen[step.place.chunk]) for step in steps if step.place.chunk in self.seen]
        if self.rate is None or not known:
            self.drift = 0.0
            return True
        moved = _distance([x for x, _ in known], [seen.x for _, seen in known])
        self.drift += self.rate * moved / _size([seen.answer.value for _, seen in known])
        again = self.drift >= self.threshold
        self.drift = 0.0 if again else self.drift
        return again

    def _learn(self, told: Sequence[tuple[Step, Velocity]]) -> None:
        """Keeps what was recomputed, and the rate from those chunks that had been recomputed earlier."""
        pairs = [(Seen(step.x, answer), self.seen.get(step.place.chunk)) for step, answer in told]
        known = [(now, before) for now, before in pairs if before is not None]
        if known:
            moved = _distance([now.x for now, _ in known], [before.x for _, before in known])
            changed = _distance([now.answer.value for now, _ in known], [before.answer.value for _, before in known])
            self.rate = changed / moved
        self.seen |= {step.place.chunk: now for (step, _), (now, _) in zip(told, pairs, strict=True)}

    def _moved(self, step: Step) -> Velocity:
        x, answer = self.seen[step.place.chunk]
        return Velocity(answer.value + (step.x - x), answer.branches, recomputed=False)

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk, whose last answer is not needed any more."""
        self.seen.pop(chunk, None)
        self.inner.finish(chunk, latent)


def easycache_engine(
    run: RunSettings, make: Callable[..., CausalForward] = CausalForward, *, threshold: float
) -> Engine:
    """Makes a run over a history that recomputes when the predicted change of the output has added up to the
    threshold."""
    return wrapped_engine(run, make, lambda inner: EasyCacheForward(inner, threshold))


def _distance(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    return torch.stack([(a - b).abs().mean() for a, b in zip(now, before, strict=True)]).mean().item()


def _size(parts: Sequence[Tensor]) -> float:
    return torch.stack([part.abs().mean() for part in parts]).mean().item()
