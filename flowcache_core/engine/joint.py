"""All chunks of a window in one forward, attending to each other both ways: SkyReels-V2 as it runs unaccelerated.

There is no history: chunks that have not begun go along at the first noise level, finished ones as they are. Start and
end frames are given beside the chunks, so they need not fill one.

Source: SkyReels-V2, skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..history.cache import Attention
from ..history.positions import RotaryTables
from ..history.snapshot import Snapshot, SnapshotDelta
from ..report import Report
from ..schedule import ChunkSchedule, Given, Place
from ..solvers.weights import joined
from .contexts import Contexts
from .forward import Step, Velocity
from .guidance import Guidance, Texts
from .layers import frame_levels
from .sites import Sites

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]
MOST_BRANCHES = 16  # of guidance, whose texts are kept: a window has one text for each


class WindowSite(NamedTuple):
    """What a window keeps on one device."""

    backbone: Any
    contexts: Contexts
    tables: RotaryTables


class WindowForward:
    """A forward whose chunks go through the network as one: what joint and rolling windows have in common.

    Args:
        backbone, guidance, report, attention, check: as for `CausalForward`.
        tables: rotary, of the video's frames.
    """

    holds_residual = False

    def __init__(
        self,
        backbone,
        guidance: Guidance,
        report: Report,
        tables: RotaryTables,
        attention: Attention = F.scaled_dot_product_attention,
        check: Callable[[], None] = lambda: None,
    ):
        self.backbone, self.guidance, self.report = backbone, guidance, report
        self.attention, self.check = attention, check
        self.turn = backbone.rotary.product.turn

        def site(one: Any, device: torch.device) -> WindowSite:
            contexts = Contexts(one.context, MOST_BRANCHES)
            return WindowSite(one, contexts, tables if one is backbone else tables.on(device))

        self.sites = Sites(backbone, tables.device, site)

    def mix(self, step: Step, oldest: bool) -> Hashable:
        """Names the sum of branches that a step's velocity will be."""
        return self.guidance.mix(step)

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        raise UserError("Chunks of one window cannot be watched one by one; choose another preset.")

    def guided(self, steps: Sequence[Step], network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Guided velocities of parts that lie behind one another."""
        self.check()
        begun = time.perf_counter()
        answer = self.guidance.velocities(steps, network)
        self.report.forward_seconds += time.perf_counter() - begun
        return answer

    def run(self, site: WindowSite, steps: Sequence[Step], texts: Texts, attend: AttendLayer) -> list[Tensor]:
        """Runs a site's network once over parts that lie behind one another; x holds all branches."""
        x, levels, backbone = joined([step.x for step in steps], dim=2), frame_levels(steps), site.backbone
        conditioning = backbone.conditioning(x, levels, [[site.contexts.of(text) for text in texts(0)]])
        hidden = backbone.embed(x)
        for layer in range(backbone.layers):
            self.check()
            hidden = backbone.block(layer, hidden, conditioning, partial(attend, layer))
        velocity = backbone.head(x, levels, backbone.residual(x, hidden))
        return list(velocity.split([step.x.shape[2] for step in steps], dim=2))

    settled = True
    movable = ()  # what there is of a history stays on the device

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history in use, and of its buffers: there is none."""
        return 0, 0

    def settle(self) -> None:
        """Stores nothing: no history is left for a later run."""

    def save(self) -> dict[Hashable, Snapshot]:
        """Keeps nothing to go on from."""
        return {}

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Keeps nothing to resume from."""
        return lambda: SnapshotDelta({}, True)


class JointForward(WindowForward):
    """The forwards of one window.

    Args:
        backbone, guidance, report, tables, attention, check: as for `WindowForward`.
        schedule: lag 0 denoises all chunks together (synchronous), a lag above that one after another. Its prefix is 0.
        first_level: noise level of chunks that wait.
        start: gives a chunk's latent at that level.
        grain: fresh unit noise of the start frames' shape for a tick, where they are shown at a noise level.
    """

    def __init__(
        self,
        backbone,
        guidance: Guidance,
        report: Report,
        schedule: ChunkSchedule,
        first_level: float,
        start: Callable[[int], Tensor],
        grain: Callable[[int], Tensor] | None = None,
        **more,
    ):
        super().__init__(backbone, guidance, report, **more)
        if schedule.prefix:
            raise UserError("A joint window takes the frames that it is given beside its chunks, not as prefix chunks.")
        self.schedule, self.first_level, self.grain = schedule, first_level, grain
        self.waiting = [start(chunk) for chunk in schedule.indices] if schedule.lag else []
        self.finished: list[Tensor] = []
        self.lead: tuple[Tensor, float] | None = None  # frames before the chunks and their noise level
        self.end: Tensor | None = None

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Takes frames before or after the chunks, shown at a noise level."""
        if chunk is Given.END:
            self.end = latent
        else:
            self.lead = latent, condition

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the whole window."""
        tick = steps[0].place.tick
        begun = steps[-1].place.chunk + 1 if isinstance(steps[-1].place.chunk, int) else 0
        window = [self._part(latent, 0.0) for latent in self.finished]
        if self.lead is not None:
            window.insert(0, self._part(self._shown(tick), self.lead[1]))
        before = len(window)
        window += [*steps, *(self._part(latent, self.first_level) for latent in self.waiting[begun:])]
        if self.end is not None:
            window.append(self._part(self.end, 0.0))
        values, branches = self.guided(window, self.network)
        return [Velocity(value, branches) for value in values[before : before + len(steps)]]

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk, which goes along as it is from now on."""
        self.finished.append(latent)

    def _shown(self, tick: int) -> Tensor:
        """The start frames as a tick sees them."""
        assert self.lead is not None
        latent, condition = self.lead
        return torch.lerp(latent, self.grain(tick), condition) if condition and self.grain else latent

    def _part(self, latent: Tensor, sigma: float) -> Step:
        return Step(latent, sigma, Place(0, None, 0))

    def network(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        site = self.sites.of(backbone, steps[0].x.device)
        table = site.tables.of(0, sum(step.x.shape[2] for step in steps))
        return self.run(
            site, steps, texts, lambda layer, q, k, v: self.attention(self.turn(q, table), self.turn(k, table), v)
        )
