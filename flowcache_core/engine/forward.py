"""What the loop asks of a forward, and what it gets back."""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..history.offload import Movable
from ..history.snapshot import Snapshot, SnapshotDelta
from ..report import Report
from ..schedule import Given, Place


class Step(NamedTuple):
    """What a chunk is asked for in a tick.

    Attributes:
        x: [B, C, T, H, W], its latent; [branches * B, ...], branch after branch, inside a forward.
        sigma: its noise level.
        place: chunk and step.
        recompute: run the network; otherwise the forward answers from what it holds itself.
        given: frames at its beginning that are given, and shown without noise.
    """

    x: Tensor
    sigma: float
    place: Place
    recompute: bool = True
    given: int = 0


class Velocity(NamedTuple):
    """What a forward answers for a step.

    Attributes:
        value: guided velocity, noise - clean, [B, C, T, H, W].
        branches: names of the branches of guidance that it is the sum of.
        recomputed: whether the network was run for it.
    """

    value: Tensor
    branches: tuple[Hashable, ...]
    recomputed: bool = True


class Forward(Protocol):
    """How chunks see each other in one run, and what is kept of them; made with its memory allocated.

    Attributes:
        report: of the run; forwards add the time inside the network and the clean passes.
        holds_residual: it wants to be told also of steps that are not recomputed.
    """

    report: Report
    holds_residual: bool

    @property
    def settled(self) -> bool:
        """Whether what has grown can be copied without another pass that would change what follows."""

    def mix(self, step: Step, oldest: bool) -> Hashable:
        """Names the sum of branches that a step's velocity will be; a new one starts a new forecast."""

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        """What a policy watches for change, for each step."""

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the network for a tick's steps, oldest chunk first."""

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Runs given frames [B, C, T, H, W], shown at a noise level, and stores their keys and values."""

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk, whose keys and values are stored now or with the next forward."""

    def settle(self) -> None:
        """Stores what was left for the next forward."""

    def save(self) -> dict[Hashable, Snapshot]:
        """Copies the clean history of every branch to the CPU; nothing where none is kept."""

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Begins to copy what the clean history has grown by since the last call or since it was loaded; `full`: all
        of it. Call what it gives for the copies."""

    @property
    def movable(self) -> Collection[Movable]:
        """Histories that may leave the device, to make room there for other work."""

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history in use, and of its buffers."""
