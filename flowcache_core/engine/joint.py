"""All chunks of a window in one forward, attending to each other both ways: SkyReels-V2 as it runs unaccelerated.

There is no history: chunks that have not begun go along at the first noise level, finished ones as they are. Start and
end frames are given beside the chunks, so they need not fill one.

Source: SkyReels-V2, skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..models.rotary import rotate
from ..models.wan import Attention, WanBackbone
from ..report import Report
from ..schedule import ChunkSchedule, Place
from ..solvers.one_step import Euler, Solver, SolverFactory, no_noise
from ..solvers.weights import weighted
from .loop import Chunk, Progress, check, turns

# Latent of the window [B, C, T, H, W], noise level of each frame [T], number of its first frame -> guided velocity.
JointDenoise = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class JointGuidance:
    """Velocity of a whole window, as a weighted sum over branches of guidance that are run in one batch.

    Attributes:
        backbone: runs the window.
        texts: a text embedding [B, tokens, width] a branch.
        weights: a weight a branch; classifier-free guidance is {cond: s, uncond: 1 - s}.
        attention: used over the window.
    """

    backbone: WanBackbone
    texts: Mapping[Hashable, Tensor]
    weights: Mapping[Hashable, float]
    attention: Attention = F.scaled_dot_product_attention

    def __post_init__(self):
        self.context = self.backbone.context(torch.cat(list(self.texts.values())))

    def __call__(self, x: Tensor, levels: Tensor, first: int) -> Tensor:
        frames = torch.arange(first, first + x.shape[2], device=x.device)
        table = self.backbone.rotary.table(frames, *self.backbone.grid(*x.shape[-2:]))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(rotate(q, table), rotate(k, table), v)

        repeated = torch.cat([x] * len(self.texts))
        levels = levels.expand(repeated.shape[0], -1)
        residual = self.backbone.trunk(repeated, levels, self.context, attend)
        velocities = self.backbone.head(repeated, levels, residual).split(x.shape[0])
        return weighted(velocities, [self.weights[name] for name in self.texts])


@dataclass(frozen=True)
class Given:
    """Frames of a window that are not generated.

    Attributes:
        start: [B, C, T, H, W] before the chunks: an image, or the end of the window before.
        end: [B, C, T, H, W] after the chunks.
        condition: noise level that `start` is shown at; upstream advises 0.02 for long videos.
        grain: fresh unit noise of `start`'s shape for a tick, where `condition` is above 0.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    condition: float = 0.0
    grain: Callable[[int], Tensor] | None = None

    def __post_init__(self):
        if self.condition and (self.start is None or self.grain is None):
            raise UserError(
                f"The condition noise is {self.condition}, but there are no start frames to put it on; set it to 0."
            )

    def shown(self, tick: int) -> Tensor | None:
        """The start frames as a tick sees them."""
        if self.start is None or self.grain is None:
            return self.start
        return torch.lerp(self.start, self.grain(tick), self.condition) if self.condition else self.start


@dataclass
class JointEngine:
    """One window: a generator of finished chunks, with one forward a tick.

    Attributes:
        schedule: lag 0 denoises all chunks together (synchronous), a lag above that one after another. Its prefix is 0.
        denoise: guided velocity of the window, `JointGuidance` or the host's guider.
        sigmas: noise levels of a chunk's steps, [steps + 1], falling to 0.
        start: gives a chunk's latent [B, C, T, H, W] at the first noise level, from its index.
        noise: fresh unit noise for a chunk and step, for solvers that add some.
        solver: makes a chunk's solver.
        given: frames before and after the chunks.
        on_progress: called after every tick.
        cancelled: asked before every forward; True ends the run with `Cancelled`.
    """

    schedule: ChunkSchedule
    denoise: JointDenoise
    sigmas: Sequence[float]
    start: Callable[[int], Tensor]
    noise: Callable[[int, int], Tensor] = no_noise
    solver: SolverFactory = Euler
    given: Given = Given()
    on_progress: Callable[[Progress], None] = lambda progress: None
    cancelled: Callable[[], bool] = lambda: False
    report: Report = field(init=False)

    def __post_init__(self):
        if self.schedule.prefix:
            raise UserError("A joint window takes the frames that it is given beside its chunks, not as prefix chunks.")
        if len(self.sigmas) != self.schedule.steps + 1:
            raise ValueError(
                f"{self.schedule.steps} steps need {self.schedule.steps + 1} noise levels, got {len(self.sigmas)}."
            )
        self.report = Report(self.schedule)
        self.latents: dict[int, Tensor] = {}
        self.solvers: dict[int, Solver] = {}

    def run(self) -> Iterator[Chunk]:
        """Generates the schedule's chunks, oldest first."""
        return turns(self.schedule, self.report, self._tick, self.on_progress)

    def _begin(self, places: Sequence[Place]) -> None:
        """Gives every chunk its noise, also those that only wait."""
        if not self.latents:
            self.latents = {chunk: self.start(chunk) for chunk in self.schedule.indices}

    @torch.inference_mode()
    def _tick(self, tick: int, places: Sequence[Place]) -> list[Chunk]:
        check(self.cancelled, self.report)
        self._begin(places)
        steps = {place.chunk: place.step for place in places}
        window, levels = self._window(tick, steps)
        x = torch.cat(window, dim=2)
        frames = [part.shape[2] for part in window]
        per_frame = torch.cat([_of_frames(part, level) for part, level in zip(window, levels, strict=True)])
        begun = time.perf_counter()
        velocities = self.denoise(x, per_frame, self._first_frame(places)).split(frames, dim=2)
        self.report.forward_seconds += time.perf_counter() - begun
        before = 0 if self.given.start is None else 1
        at = {chunk: number for number, chunk in enumerate(self._chunks(steps), start=before)}
        done = []
        for place in places:
            chunk, step = place.chunk, place.step
            if step == 0:
                self.solvers[chunk] = self.solver(self.sigmas, self._noise_of(chunk))
            self.latents[chunk] = self.solvers[chunk].step(self.latents[chunk], velocities[at[chunk]], step)
            self.report.record(place, "joint", True)
            if step == self.schedule.steps - 1:
                done.append(self._finish(chunk))
        return done

    def _noise_of(self, chunk: int) -> Callable[[int], Tensor]:
        return lambda step: self.noise(chunk, step)

    def _chunks(self, steps: Mapping[int, int]) -> Sequence[int]:
        """The chunks that go through the network together."""
        return self.schedule.indices

    def _first_frame(self, places: Sequence[Place]) -> int:
        """The window's place in the video."""
        return 0

    def _window(self, tick: int, steps: Mapping[int, int]) -> tuple[list[Tensor], list[float]]:
        """What goes through the network at a tick, part by part, and each part's noise level."""
        parts, levels = [], []
        start = self.given.shown(tick)
        if start is not None:
            parts.append(start)
            levels.append(self.given.condition)
        for chunk in self._chunks(steps):
            parts.append(self.latents[chunk])
            waiting = self.sigmas[0] if chunk not in self.solvers else 0.0
            levels.append(self.sigmas[steps[chunk]] if chunk in steps else waiting)
        if self.given.end is not None:
            parts.append(self.given.end)
            levels.append(0.0)
        return parts, levels

    def _finish(self, chunk: int) -> Chunk:
        self.report.chunks_done += 1
        return Chunk(chunk, self.latents[chunk])


def _of_frames(x: Tensor, level: float) -> Tensor:
    """A noise level for each frame of x [B, C, T, H, W], [T]; made on x's device, which a list would have to be sent
    to."""
    return torch.full((x.shape[2],), level, dtype=torch.float32, device=x.device)
