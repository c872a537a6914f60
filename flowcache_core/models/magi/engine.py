"""MAGI-1's sampler: the loop of `engine.py` with what is MAGI-1's own.

A tick goes branch by branch, not chunk by chunk. All branches share one history: in each branch the active chunks write
their keys anew, oldest first, before a later one reads them, and the last branch's stay; of a chunk whose step is
reused, every branch reads those. A finished chunk's clean pass opens every branch of the next tick; there it sees
itself alone, without caption. Some forwards run a chunk alone: to guide away from the lack of a past (base), or to mix
into the oldest chunk's velocity (distilled).

Source: MAGI-1, inference/pipeline/video_generate.py and forward_dispatcher in inference/model/dit/dit_model.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...engine.loop import Chunk, Progress, check, turns
from ...errors import UserError
from ...history.cache import History, grown, moved_note
from ...history.compression import Compression
from ...history.offload import OUT_OF_MEMORY, spared
from ...history.settings import HistorySettings, HistoryShape
from ...history.snapshot import Clean, Grown
from ...history.streams import SideStream
from ...report import Report
from ...reuse.policies import Corrector, Forecast, changes
from ...schedule import CLEAN, ChunkSchedule, Place
from ...solvers.noise_levels import row_levels
from ...solvers.one_step import Euler, no_noise
from ..presets import Settings
from ..rotary import rotate
from .config import MagiConfig
from .network import Attention, MagiBackbone, MagiContext, MagiText, grouped_attention
from .sampling import (
    CHUNK_FRAMES,
    CLEAN_TIME,
    NEAR_CLEAN_WEIGHT,
    VISIBLE_CHUNKS,
    WINDOW,
    GuidanceScales,
    ShortOrder,
    near_clean,
    sigmas,
    step_size,
    visible_before,
)

SHARED = "past"  # the name that the one history has in a state


@dataclass(frozen=True)
class MagiSampling:
    """How a run samples; the defaults are upstream's.

    Attributes:
        guidance: scales of a base network; a distilled one takes none.
        visible: by stage, how many chunks a chunk sees, itself included; empty for all. Only while the history keeps
            whole chunks: with a budget and token-wise compression a chunk sees everything that is kept.
        order: of 12 steps.
        near_clean: mixes the distilled network's run of the oldest chunk alone into its velocity.
        held: what a reused step takes again: the velocity, or the latent's last change over one step, however long the
            step is now.
    """

    guidance: GuidanceScales = field(default_factory=GuidanceScales)
    visible: tuple[int, ...] = VISIBLE_CHUNKS
    order: ShortOrder = "8,16,16"
    near_clean: bool = True
    held: Literal["velocity", "change"] = "velocity"


# What the published FlowCache runs a distilled MAGI-1 with, beside no clean pass and a held, uncorrected velocity.
PUBLISHED_FLOWCACHE = MagiSampling(visible=(), near_clean=False, held="change")


class Finished(NamedTuple):
    """A chunk that waits for its clean pass."""

    chunk: int
    latent: Tensor


def magi_schedule(frames: int, steps: int, given_frames: int = 0) -> ChunkSchedule:
    """The schedule of a run.

    Args:
        frames: latent frames to generate.
        steps: of a chunk, a multiple of 4.
        given_frames: latent frames that come before; whole chunks of them are not generated, the rest is pasted into
            the first active chunk at every step.
    """
    chunks, prefix = -(-(frames + given_frames) // CHUNK_FRAMES), given_frames // CHUNK_FRAMES
    return ChunkSchedule(chunks - prefix, steps, len(sigmas(steps)) // WINDOW, prefix=prefix)


def history_plan(
    config: MagiConfig, schedule: ChunkSchedule, settings: Settings, sampling: MagiSampling, latent: Sequence[int]
) -> tuple[HistoryShape, HistorySettings]:
    """What a run allocates for its history: `shape.bytes(2)` of it in bfloat16.

    Without a budget, chunks that none will see any more are dropped: with upstream's ranges there are never more than
    6 in a run from noise (one clean, four active, one waiting for its clean pass), whatever its length.

    Args:
        latent: shape of a chunk, [B, C, 6, H, W].
    """
    history = settings.history
    if history.budget is None and sampling.visible:
        budget = clean_chunks_seen(sampling.visible, schedule.prefix)
        history = replace(history, budget=budget, compression=Compression("window"))
    capacity = schedule.total_chunks
    if history.budget is not None:
        capacity = min(capacity, history.budget + schedule.max_active + int(settings.clean_pass))
    shape = HistoryShape(
        layers=config.layers,
        batch=latent[0],
        heads=config.kv_heads,
        head_dim=config.head_dim,
        grid=(latent[3] // config.patch, latent[4] // config.patch),
        chunk_frames=CHUNK_FRAMES,
        capacity=capacity,
    )
    return shape, history


def clean_chunks_seen(visible: Sequence[int], prefix: int) -> int:
    """How many clean chunks are looked at: in the midst of a run, and by the first chunks after a prefix."""
    count = len(visible)
    between = [
        (count - 1 - stage) * WINDOW // count for stage in range(count)
    ]  # active chunks before one of that stage
    midst = max(seen - 1 - active for seen, active in zip(visible, between, strict=True))
    return max(1, midst, min(prefix, max(visible) - 1))


class MagiEngine:
    """One run: a generator of finished chunks.

    Args:
        backbone: of the network.
        schedule: `magi_schedule`'s.
        settings: what to reuse and how much history to keep.
        text: gives a chunk's caption from its index (`magi_text.caption_text`).
        null: the empty caption (`magi_text.null_text`).
        start: gives a chunk's noise [B, C, 6, H, W] from its index.
        sampling: how to sample.
        given: latent frames [B, C, T, H, W] before the first generated one, as `magi_schedule` was told.
        attention: used over the history and in forwards alone; must accept fewer heads in keys than in queries.
        on_progress: called after every tick.
        cancelled: asked before every forward; True ends the run with `Cancelled`.

    Raises:
        UserError: settings that MAGI-1 cannot be run with.
    """

    def __init__(
        self,
        backbone: MagiBackbone,
        schedule: ChunkSchedule,
        settings: Settings,
        text: Callable[[int], MagiText],
        null: MagiText,
        start: Callable[[int], Tensor],
        sampling: MagiSampling = MagiSampling(),
        given: Tensor | None = None,
        attention: Attention = grouped_attention,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        if settings.reuse.held == "residual":
            raise UserError(
                "MAGI-1 is run with the velocity held, not the residual, of which there would be three a chunk."
            )
        self.backbone = backbone
        self.schedule = schedule
        self.settings = settings
        self.text = text
        self.null = null
        self.start = start
        self.sampling = sampling
        self.given = given
        self.attention = attention
        self.on_progress = on_progress
        self.cancelled = cancelled
        self.branches = ("text",) if backbone.config.distilled else ("text", "past")
        self.sigmas = sigmas(schedule.steps, sampling.order)
        self.policy = settings.reuse.make(schedule)
        self.order = settings.reuse.order_on(schedule)
        self._solver = Euler(self.sigmas, partial(no_noise, 0))
        self.report = Report(schedule)
        self.history: History = None  # type: ignore[assignment]  # made at the first forward, which tells its size
        self.estimates: dict[int, Callable[[], Tensor]] = {}  # of clean chunks, by the last tick's velocity: previews
        self._loaded: Clean | None = None
        self._latents: dict[int, Tensor] = {}
        self._forecasts: dict[int, Forecast] = {}
        self._correctors: dict[int, Corrector] = {}
        self._weights: dict[int, dict[str, float]] = {}  # of the branches, at a chunk's last recomputed step
        self._signals: dict[int, Tensor] = {}
        self._contexts: dict[tuple, MagiContext] = {}
        self._finished: Finished | None = None

    def run(self) -> Iterator[Chunk]:
        """Generates the schedule's chunks, oldest first; given whole chunks are run first, at `CLEAN_TIME`."""
        frames = 0 if self.given is None else self.given.shape[2]
        if self._loaded is None and frames // CHUNK_FRAMES != self.schedule.prefix:
            raise UserError(
                f"{frames} latent frames are given, but the schedule is one for {self.schedule.prefix} given chunks of "
                f"{CHUNK_FRAMES}: tell magi_schedule() how many frames are given, or load a state."
            )
        if self._loaded is None:
            self._prefill()
        return turns(self.schedule, self.report, self._tick, self.on_progress)

    def load(self, clean: Clean) -> None:
        """Starts from the clean history of an earlier run, which holds the schedule's given chunks."""
        self._loaded = clean

    @torch.inference_mode()
    def save(self) -> dict[str, Clean]:
        """The clean history of a run that has ended, on the CPU."""
        if self._finished is not None:
            self._clean_pass(self.branches[-1])
            self._commit_finished()
        return {SHARED: self.history.save()}

    @torch.inference_mode()
    def save_new(self, anew: bool) -> Callable[[], Grown]:
        """Begins to copy what the clean history has grown by since the last call or `load`, up to the newest chunk that
        was handed out; `anew`: all of it. Call what it gives for the copy.

        A chunk that waits for its clean pass gets one more, which the next tick repeats: the run goes on as it would.
        """
        asking = list(self.history.queries)
        self._clean_pass(self.branches[-1])
        new = grown({SHARED: self.history}, anew, finished=int(self._finished is not None))
        self.history.queries = asking
        return new

    @torch.inference_mode()
    def _prefill(self) -> None:
        for chunk in range(self.schedule.prefix):
            assert self.given is not None
            self._finished = Finished(chunk, self.given[:, :, chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES])
            self._clean_pass(self.branches[-1])
            self._commit_finished()

    @torch.inference_mode()
    def _tick(self, tick: int, places: Sequence[Place]) -> list[Chunk]:
        self.estimates = {}
        for place in places:
            x = self.start(place.chunk) if place.step == 0 else self._latents[place.chunk]
            self._latents[place.chunk] = self._with_given(place.chunk, x)
            if place.step == 0:
                self._history_of(x).open(place.chunk)  # cuts the history, where it must be cut, before anyone reads it
        changes = self._changes(places)
        weights = {place.chunk: self._mix(place, place is places[0]) for place in places}
        again = [place for place in places if self._recompute(place, changes, weights[place.chunk])]
        velocities = self._velocities(again, weights)
        for place in places:
            for branch in weights[place.chunk]:
                self.report.record(place, branch, place in again)
            self._step(place, velocities.get(place.chunk), weights[place.chunk])
        self._commit_finished()
        self.report.note(moved_note([self.history]), OUT_OF_MEMORY)
        chunks = [self._finish(place.chunk) for place in places if place.step == self.schedule.steps - 1]
        self.report.history.append((tick, self.history.bytes_used))
        return chunks

    def _step(self, place: Place, fresh: Tensor | None, weights: dict[str, float]) -> None:
        """Takes a chunk one step on, by a recomputed velocity or by what stands in for it."""
        chunk, sigma = place.chunk, self.sigmas[place.step]
        length = self.sigmas[place.step + 1] - sigma
        changes_held = self.sampling.held == "change"
        if self._weights.get(chunk) != weights:  # no line leads from one mix of branches to another
            self._weights[chunk] = weights
            self._forecasts[chunk], self._correctors[chunk] = Forecast(self.order), Corrector(self.order)
        forecast = self._forecasts[chunk]
        if fresh is not None:
            forecast.add(place.step, fresh * length if changes_held else fresh)
        velocity = forecast.at(place.step)
        x = self._latents[chunk]
        if self.settings.reuse.correct and not changes_held and fresh is not None:
            x = self._correctors[chunk].step(x, self._solver, velocity, place.step)
        step = 1.0 if changes_held else length
        self.estimates[chunk] = partial(torch.add, x, velocity, alpha=step * -sigma / length)
        self._latents[chunk] = torch.add(x, velocity, alpha=step)

    def _finish(self, chunk: int) -> Chunk:
        x = self._latents.pop(chunk)
        for kept in (self._forecasts, self._correctors, self._weights, self._signals):
            kept.pop(chunk, None)
        self._contexts = {key: context for key, context in self._contexts.items() if key[0] != chunk}
        self.report.chunks_done += 1
        self._finished = Finished(chunk, self._with_given(chunk, x))
        if not self.settings.clean_pass:
            self._commit_finished()
        return Chunk(chunk, x)

    def _commit_finished(self) -> None:
        if self._finished is not None:
            self.history.commit(self._finished.chunk)
            self._finished = None

    def _with_given(self, chunk: int, x: Tensor) -> Tensor:
        """The chunk with its given frames in their place."""
        own = None if self.given is None else self.given[:, :, chunk * CHUNK_FRAMES :]
        return x if own is None or not own.shape[2] else torch.cat([own.to(x), x[:, :, own.shape[2] :]], dim=2)

    def _changes(self, places: Sequence[Place]) -> dict[int, float]:
        """Relative change of each active chunk's signal since the last tick, where the policy watches it."""
        if not self.policy.watches:
            return {}
        signals = {
            place.chunk: self.backbone.reuse_signal(
                self._latents[place.chunk], self._level(place.chunk, self.sigmas[place.step])
            )
            for place in places
        }
        before, self._signals = self._signals, signals
        return changes(signals, before, self.policy.whole_window)

    def _recompute(self, place: Place, changes: dict[int, float], weights: dict[str, float]) -> bool:
        """The policy's decision; a step at which the branches are weighed anew, and the run's last, always."""
        again = self.policy.recompute(place, self.schedule.steps, SHARED, changes.get(place.chunk))
        return again or self._weights.get(place.chunk) != weights or place.tick == self.schedule.ticks - 1

    def _mix(self, place: Place, oldest: bool) -> dict[str, float]:
        """Weights of the branches whose velocities make up a chunk's."""
        t = 1.0 - self.sigmas[place.step]
        if not self.backbone.config.distilled:
            return {branch: weight for branch, weight in self.sampling.guidance.weights(t).items() if weight}
        if oldest and self.sampling.near_clean and near_clean(t):
            return {"text": NEAR_CLEAN_WEIGHT, "alone": 1.0 - NEAR_CLEAN_WEIGHT}
        return {"text": 1.0}

    def _velocities(self, places: Sequence[Place], weights: dict[int, dict[str, float]]) -> dict[int, Tensor]:
        """Guided velocities of the chunks that are recomputed in this tick."""
        velocities: dict[int, Tensor] = {}
        for branch in self.branches:
            # The last branch's keys stay; of another one only those are needed that a weighed chunk reads.
            weighed = [number for number, place in enumerate(places) if branch in weights[place.chunk]]
            count = len(places) if branch == self.branches[-1] else max(weighed, default=-1) + 1
            if count or branch == self.branches[-1]:
                self._clean_pass(branch)
            for place in places[:count]:
                residual = self._forward(place, branch)
                self._add(velocities, place, weights, branch, residual)
        for place in places:
            if "alone" in weights[place.chunk]:
                self._add(velocities, place, weights, "alone", self._forward(place, "alone"))
        return velocities

    def _add(self, velocities: dict, place: Place, weights: dict, branch: str, residual: Tensor) -> None:
        if branch not in weights[place.chunk]:
            return
        x, level = self._latents[place.chunk], self._level(place.chunk, self.sigmas[place.step])
        velocity = self._timed(lambda: self.backbone.head(x, level, residual)) * weights[place.chunk][branch]
        velocities[place.chunk] = velocities[place.chunk] + velocity if place.chunk in velocities else velocity

    def _forward(self, place: Place, branch: str) -> Tensor:
        x, level = self._latents[place.chunk], self._level(place.chunk, self.sigmas[place.step])
        context = self._context(place.chunk, branch, place.step)
        if branch == "alone":
            return self._trunk(x, level, context, self._attend_alone(x))
        visible = None
        if self._whole_chunks:
            visible = visible_before(place.step, self.schedule.steps, self.sampling.visible)
        view = self._history_of(x).view(place.chunk, visible)
        return self._trunk(x, level, context, lambda layer, q, k, v: view.attend(layer, q, k, v, self.attention))

    def _clean_pass(self, branch: str) -> None:
        """Writes the finished chunk's keys and values as it sees itself alone, without caption."""
        if self._finished is None:
            return
        chunk, x = self._finished
        view = self._history_of(x).view(chunk, visible=0)
        context = self._context(CLEAN, branch, 0)
        level = row_levels(1.0 - CLEAN_TIME, x)
        self._trunk(x, level, context, lambda layer, q, k, v: view.attend(layer, q, k, v, self.attention))
        self.report.record(Place(chunk, CLEAN, self.schedule.start(chunk) + self.schedule.steps), branch, True)

    def _trunk(self, x: Tensor, level: Tensor, context: MagiContext, attend) -> Tensor:
        check(self.cancelled, self.report)
        return self._timed(lambda: self.backbone.trunk(x, level, context, attend))

    def _timed(self, work: Callable[[], Tensor]) -> Tensor:
        """A part of a forward."""
        begun = time.perf_counter()
        result = spared(work, [self.history])
        self.report.forward_seconds += time.perf_counter() - begun
        return result

    def _attend_alone(self, x: Tensor):
        frames = torch.arange(x.shape[2], device=x.device)
        table = self.backbone.rotary.table(frames, *self.backbone.grid(*x.shape[-2:]))
        return lambda layer, q, k, v: self.attention(rotate(q, table), rotate(k, table), v)

    def _context(self, chunk: int, branch: str, step: int) -> MagiContext:
        """Conditioning of a chunk in a branch; chunk CLEAN stands for all clean passes."""
        captioned = branch == "text" or self.backbone.config.distilled
        size = step_size(self.schedule.steps, step, self.sampling.order) if self.backbone.config.distilled else None
        key = (chunk if captioned else CLEAN, captioned, size)
        if key not in self._contexts:
            text = self.text(chunk) if captioned and chunk != CLEAN else self.null
            self._contexts[key] = self.backbone.context(text._replace(captioned=captioned, step_size=size))
        return self._contexts[key]

    def _level(self, chunk: int, sigma: float) -> Tensor:
        return row_levels(sigma, self._latents[chunk])

    @property
    def _whole_chunks(self) -> bool:
        """Whether the history keeps whole chunks, so that a number of them can be looked at."""
        history = self.settings.history
        return bool(self.sampling.visible) and (history.budget is None or history.compression.rule == "window")

    def _history_of(self, x: Tensor) -> History:
        if self.history is None:
            shape, settings = history_plan(self.backbone.config, self.schedule, self.settings, self.sampling, x.shape)
            side = SideStream(x.device, self.settings.overlap)
            self.history = History(shape, self.backbone.rotary, settings, self.backbone.network.dtype, x.device, side)
            if self._loaded is not None:
                self.history.load(self._loaded)
            whole = replace(shape, capacity=self.schedule.total_chunks)
            self.report.history_bytes_allocated = self.history.bytes
            self.report.history_bytes_unbounded = whole.bytes(self.history.dtype.itemsize)
        return self.history
