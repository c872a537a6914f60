"""EasyCache's rule as ComfyUI applies it: one decision for the whole latent, from how strongly it has answered so far.

The output of a recomputed step changed by so much for so much change of the input; with that rate, the change of the
input since the last recomputed step predicts the output's, in parts of its size. The predictions are added up, and the
sum decides. A step that is not recomputed gives the input plus the last difference between output and input.

Source: ComfyUI, comfy_extras/nodes_easycache.py (EasyCache, arXiv 2507.02860). The host starts it at 15% of the noise
levels and looks at every 8th row and column; here it starts as soon as it can, which lets it reach higher speeds, and
sees every value.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.build import RunSettings, causal_forward
from ..engine.causal import CausalForward
from ..engine.forward import Forward, Step, Velocity
from ..engine.loop import Engine
from ..history.offload import Movable
from ..history.snapshot import Snapshot, SnapshotDelta
from ..report import Report
from ..reuse.policies import Deciding
from ..schedule import Given
from ..settings import HELD


class Seen(NamedTuple):
    """Input and guided velocity of a chunk's last recomputed step, [B, C, T, H, W]."""

    x: Tensor
    answer: Velocity


class ForwardDecides:
    """A policy that leaves the decision to the forward, which sees the latents."""

    watches = whole_window = False

    def decide(self, chunks: Sequence[Deciding]) -> list[bool]:
        """Asks the forward every time."""
        return [True for _ in chunks]

    def recomputed(self, steps: int) -> None:
        """Depends on what is seen."""
        return None

    def weighed(self, chunk: Deciding) -> None:
        """The forward weighs it itself."""
        return None


class WrappedForward:
    """Another forward under a rule that sees the latents: what the rule does not change is passed on.

    Args:
        inner: runs the network.
    """

    holds_residual = False

    def __init__(self, inner: Forward):
        self.inner, self.report = inner, inner.report

    def mix(self, step: Step, oldest: bool) -> Hashable:
        """Names the sum of branches that a step's velocity will be."""
        return self.inner.mix(step, oldest)

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        """What a policy watches for change."""
        return self.inner.signals(steps)

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Runs given frames."""
        self.inner.give(chunk, latent, condition)

    @property
    def settled(self) -> bool:
        """Whether all finished chunks have had their clean pass."""
        return self.inner.settled

    def settle(self) -> None:
        """Stores what was left for the next forward."""
        self.inner.settle()

    def save(self) -> dict[Hashable, Snapshot]:
        """Copies the clean history to the CPU."""
        return self.inner.save()

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Begins to copy what the clean history has grown by."""
        return self.inner.begin_delta(full)

    @property
    def movable(self) -> Collection[Movable]:
        return self.inner.movable

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history in use, and of its buffers."""
        return self.inner.history_bytes


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
    policy = ForwardDecides()
    inner = causal_forward(run, policy, Report(run.schedule, run.label), make)
    return Engine(EasyCacheForward(inner, threshold), run.schedule, policy, HELD, run.sampling)


def _distance(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    return torch.stack([(a - b).abs().mean() for a, b in zip(now, before, strict=True)]).mean().item()


def _size(parts: Sequence[Tensor]) -> float:
    return torch.stack([part.abs().mean() for part in parts]).mean().item()
