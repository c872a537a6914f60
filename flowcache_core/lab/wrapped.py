"""Runs whose forward is another one under a rule that sees the latents."""

from collections.abc import Callable, Collection, Hashable, Sequence

from torch import Tensor

from ..engine.build import RunSettings, causal_forward
from ..engine.causal import CausalForward
from ..engine.forward import Forward, Step
from ..engine.loop import Engine
from ..history.offload import Movable
from ..history.snapshot import Snapshot, SnapshotDelta
from ..report import Report
from ..reuse.policies import Deciding
from ..schedule import Given
from ..settings import HELD


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


def wrapped_engine(
    run: RunSettings,
    make: Callable[..., CausalForward],
    wrap: Callable[[CausalForward], Forward],
) -> Engine:
    """Makes a run over a history under a rule.

    Args:
        make: of the forward that runs the network.
        wrap: puts it under the rule.
    """
    policy = ForwardDecides()
    inner = causal_forward(run, policy, Report(run.schedule, run.label), make)
    return Engine(wrap(inner), run.schedule, policy, HELD, run.sampling)
