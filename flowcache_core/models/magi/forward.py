"""MAGI-1's forwards: the loop is that of `engine.loop`, how its chunks see each other is its own.

All branches of guidance share one history. In a tick each branch goes through the network by itself: the active chunks
write their keys, oldest first, before a younger one reads them, and the last branch's stay; of a chunk whose step is
reused, nobody needs them. A finished chunk's clean pass opens every branch of the next forward; there it sees itself
alone, without caption. Some chunks also go through the network alone: to guide away from the lack of a past (base), or
to mix into the oldest chunk's velocity (distilled).

Source: MAGI-1, inference/pipeline/video_generate.py and forward_dispatcher in inference/model/dit/dit_model.py.
"""

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from ...engine.counted import counted
from ...engine.forward import Step, Velocity
from ...engine.from_video import FromVideo
from ...engine.idle import idle_notes, uncut_notes
from ...engine.layers import by_chunk, row_levels, run_layers
from ...engine.loop import Boundary, Engine, Progress, Sampling, check_cancelled
from ...errors import UserError
from ...history.cache import History, begin_delta, moved_note
from ...history.offload import TOO_LITTLE, Movable, attempts
from ...history.plan import MemoryPlan, plan_memory
from ...history.positions import Positions
from ...history.room import placed
from ...history.snapshot import Snapshot, SnapshotDelta
from ...history.streams import SideStream
from ...report import Report
from ...reuse.policies import Policy, aligned
from ...schedule import ChunkSchedule, Given, Place
from ...settings import Compression, Settings
from ...solvers.weights import weighted
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

Kept = Literal["", "whole", "added"]
SHARED = "past"  # the name that the one history has in a state
Captured = tuple[Tensor, Tensor, Tensor]  # keys, values and token numbers, as in a `Snapshot`


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

    def mix(self, step: int, steps: int, distilled: bool, oldest: bool) -> dict[str, float]:
        """Weighs the branches whose velocities make up a chunk's at a step."""
        t = 1.0 - sigmas(steps, self.order)[step]
        if not distilled:
            return {branch: weight for branch, weight in self.guidance.weights(t).items() if weight}
        if oldest and self.near_clean and near_clean(t):
            return {"text": NEAR_CLEAN_WEIGHT, "alone": 1.0 - NEAR_CLEAN_WEIGHT}
        return {"text": 1.0}


# What the published FlowCache runs a distilled MAGI-1 with, beside no clean pass and a held, uncorrected velocity.
PUBLISHED_FLOWCACHE = MagiSampling(visible=(), near_clean=False, held="change")


def magi_schedule(frames: int, steps: int, given_frames: int = 0) -> ChunkSchedule:
    """Makes the schedule of a run.

    Args:
        frames: latent frames to generate.
        steps: of a chunk, a multiple of 4.
        given_frames: latent frames that come before; whole chunks of them are not generated, the rest is pasted into
            the first active chunk at every step.
    """
    chunks, prefix = -(-(frames + given_frames) // CHUNK_FRAMES), given_frames // CHUNK_FRAMES
    return ChunkSchedule(chunks - prefix, steps, len(sigmas(steps)) // WINDOW, prefix=prefix)


def magi_settings(settings: Settings, sampling: MagiSampling, schedule: ChunkSchedule) -> Settings:
    """Adds to settings without a budget that chunks which none will see any more are dropped: with upstream's ranges
    one clean chunk is kept in a run from noise, whatever its length.

    Raises:
        UserError: settings that MAGI-1 cannot be run with.
    """
    if settings.holds_residual:
        raise UserError(
            "MAGI-1 is run with the velocity held, not the residual, of which there would be three a chunk."
        )
    if settings.history.window is not None:
        raise UserError("MAGI-1's history is counted in chunks; set a history budget, not a window in frames.")
    if settings.history.budget is not None or not sampling.visible:
        return settings
    budget = clean_chunks_seen(sampling.visible, schedule.prefix)
    return replace(settings, history=replace(settings.history, budget=budget, compression=Compression("window")))


def clean_chunks_seen(visible: Sequence[int], prefix: int) -> int:
    """Counts the clean chunks that are looked at: in the middle of a run, and by the first chunks after a prefix."""
    count = len(visible)
    # Active chunks before one of each stage.
    between = [(count - 1 - stage) * WINDOW // count for stage in range(count)]
    middle = max(seen - 1 - active for seen, active in zip(visible, between, strict=True))
    return max(1, middle, min(prefix, max(visible) - 1))


def magi_plan(
    config: MagiConfig,
    schedule: ChunkSchedule,
    settings: Settings,
    sampling: MagiSampling,
    latent: Sequence[int],
    itemsize: int = 2,
    at_once: bool = True,
) -> MemoryPlan:
    """Plans a run's memory.

    Args:
        settings: `magi_settings`'.
        latent: shape of a chunk, [B, C, 6, H, W].
        itemsize: bytes of a number.
        at_once: as for `history.plan.plan_memory`.
    """
    plan = plan_memory(
        config.sizes,
        schedule,
        settings,
        settings.reuse.policy(schedule),
        grid=(latent[3] // config.patch, latent[4] // config.patch),
        chunk_frames=CHUNK_FRAMES,
        batch=latent[0],
        itemsize=itemsize,
        at_once=at_once,
        waiting=settings.clean_pass,
        also=mix_changes(config, schedule, sampling),
    )
    return replace(plan, texts=schedule.max_active + 2)  # the empty one, and that of a chunk that becomes clean


def mix_changes(config: MagiConfig, schedule: ChunkSchedule, sampling: MagiSampling) -> frozenset[int]:
    """Lists the steps at which the branches are weighed anew, which are always recomputed."""
    steps = range(schedule.skipped, schedule.whole_steps)
    mixes = [sampling.mix(step, schedule.whole_steps, config.distilled, oldest=True) for step in steps]
    return frozenset(step for step in range(1, schedule.steps) if mixes[step] != mixes[step - 1])


def magi_sampling(
    schedule: ChunkSchedule,
    sampling: MagiSampling,
    start: Callable[[int], Tensor],
    given: Tensor | None,
    source: FromVideo | None = None,
) -> Sampling:
    """Says to the loop how chunks are denoised.

    Args:
        start: gives a chunk's noise [B, C, 6, H, W].
        given: latent frames [B, C, T, H, W] before the generated ones, as `magi_schedule` was told.
        source: a video that chunks start from, whose `schedule` this one is; None for noise alone.
    """

    def pinned(chunk: int, latent: Tensor) -> Tensor:
        own = None if given is None else given[:, :, chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES]
        if own is None or not own.shape[2]:
            return latent
        return torch.cat([own.to(latent), latent[:, :, own.shape[2] :]], dim=2)

    levels = sigmas(schedule.whole_steps, sampling.order)
    levels = levels if source is None else source.levels(levels)

    def begun(chunk: int) -> Tensor:
        return start(chunk) if source is None else source.start(chunk, start(chunk), levels[0])

    return Sampling(levels, begun, held=sampling.held, pinned=pinned, recompute_last_tick=True)


class MagiForward:
    """The forwards of one run.

    Args:
        backbone: of the network.
        schedule: `magi_schedule`'s.
        settings: `magi_settings`'.
        plan: `magi_plan`'s; the memory is allocated here.
        report: of the run.
        text: gives a chunk's caption from its number (`text.caption_text`).
        null: the empty caption (`text.null_text`).
        sampling: how to sample.
        device: that computes.
        attention: used over the history and in forwards alone; must accept fewer heads in keys than in queries.
        loaded: the clean history of an earlier run to start from.
        kept: what `begin_delta` will give for each chunk: "" for a run that is not kept; "added" behind what was
            loaded, "whole" with it at first.
        may_stop: the run may end with any chunk, so that what a run which goes on from there sees is kept at all times.
        check: called before every chunk in every layer; may raise to end the run.
    """

    holds_residual = False

    def __init__(
        self,
        backbone: MagiBackbone,
        schedule: ChunkSchedule,
        settings: Settings,
        plan: MemoryPlan,
        report: Report,
        text: Callable[[int], MagiText],
        null: MagiText,
        *,
        policy: Policy,
        device: torch.device,
        sampling: MagiSampling = MagiSampling(),
        attention: Attention = grouped_attention,
        loaded: Snapshot | None = None,
        kept: Kept = "",
        may_stop: bool = False,
        check: Callable[[], None] = lambda: None,
    ):
        self.backbone, self.schedule, self.settings, self.plan = backbone, schedule, settings, plan
        self.report, self.sampling, self.text = report, sampling, text
        self.attention, self.check = attention, check
        self.distilled = backbone.config.distilled
        self.branches = ("text",) if self.distilled else ("text", "past")
        same_ticks = aligned(policy, schedule, mix_changes(backbone.config, schedule, sampling))
        keeps_slots = by_chunk(backbone) or not (same_ticks and settings.clean_pass)
        self.cuts_early = by_chunk(backbone) and same_ticks and settings.clean_pass  # as in `engine.causal`
        stream = SideStream(device, settings.overlap)
        rotary, dtype = backbone.rotary, backbone.network.dtype
        positions = Positions(plan, rotary, device)
        self.history = History(plan, positions, settings.history, dtype, keeps_slots, stream)
        if loaded is not None:
            self.history.load(loaded)
        if kept == "whole":
            self.history.saved = 0
        self.kept, self.may_stop = kept, may_stop
        self.delta: Callable[[], SnapshotDelta] | None = None  # of the newest chunk, where the run is kept

        @lru_cache(2 * plan.max_active + 4)
        def context(chunk: int | Given | None, captioned: bool, size: float | None) -> MagiContext:
            told = text(chunk) if isinstance(chunk, int) else null
            return backbone.context(told._replace(captioned=captioned, step_size=size))

        self.context = context
        self.waiting: list[Step] = []  # the clean pass that goes along with the next forward
        self.seen_by_next = max(sampling.visible, default=1) - 1  # chunks that a run which goes on from here looks at
        self.tail: list[Captured] = []  # the last chunks of the run, where the history has no room for all of those
        if loaded is not None and self._captures(schedule.total_chunks - 1):
            self.tail.append(loaded[:3])
        report.history_bytes_planned = plan.history_bytes
        report.history_bytes_allocated = self.history.bytes
        report.history_bytes_unbounded = plan.unbounded_bytes

    def mix(self, step: Step, oldest: bool) -> Hashable:
        """Names the sum of branches that a step's velocity will be."""
        return tuple(self._weights(step, oldest).items())

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        """Gives what a policy watches for change, for each step."""
        return [self.backbone.reuse_signal(step.x, row_levels(step.sigma, step.x)) for step in steps]

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs all branches of a tick's steps, oldest chunk first."""
        begun = time.perf_counter()
        weights = [self._weights(step, oldest=number == 0) for number, step in enumerate(steps)]
        values: list[dict[str, Tensor]] = [{} for _ in steps]
        for branch in self.branches:
            # The last branch's keys stay; of another one only those are needed that a weighed chunk reads.
            weighed = [number for number, mix in enumerate(weights) if branch in mix]
            count = len(steps) if branch == self.branches[-1] else max(weighed, default=-1) + 1
            if count:
                answers = self._sweep(branch, steps[:count])
                for number in weighed:
                    values[number][branch] = answers[number]()
        for step, mix, value in zip(steps, weights, values, strict=True):
            if "alone" in mix:
                value["alone"] = self._alone(step)
        self.report.forward_seconds += time.perf_counter() - begun
        return [
            Velocity(weighted([value[name] for name in mix], list(mix.values())), tuple(mix))
            for mix, value in zip(weights, values, strict=True)
        ]

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Runs a given whole chunk at `CLEAN_TIME` and stores its keys and values."""
        self.waiting = [self._clean_pass(chunk, latent)]
        self.settle()

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk, whose clean pass goes along with the next forward."""
        if self.settings.clean_pass:
            self.waiting = [self._clean_pass(chunk, latent)]
        else:
            self._commit([chunk])

    @property
    def settled(self) -> bool:
        """Whether the newest finished chunk has had its clean pass; of a run that is kept, whether a copy is there."""
        return self.delta is not None if self.kept and self.settings.clean_pass else not self.waiting

    def settle(self) -> None:
        """Makes the clean pass that waits."""
        if self.waiting:
            self._sweep(self.branches[-1], [])

    def save(self) -> dict[Hashable, Snapshot]:
        """Copies the clean history to the CPU: as much of it as a run that goes on from there sees."""
        if not self.tail:
            return {SHARED: self.history.save()}
        most = self.seen_by_next * self.plan.chunk_tokens
        keys, values, tokens = (torch.cat(parts, dim=3)[:, :, :, -most:] for parts in zip(*self.tail, strict=True))
        return {SHARED: Snapshot(keys, values, tokens, torch.empty(0))}

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Begins to copy what the clean history has grown by. Where `kept` said so, that of the newest chunk was copied
        as it became clean, before others were dropped for it."""
        delta, self.delta = self.delta, None
        if delta is None:
            self.settle()
            return begin_delta({SHARED: self.history}, full)
        return delta

    def _taken(self, chunk: int | Given) -> Captured:
        """What the history has captured of a chunk."""
        pairs, self.history.captured = self.history.captured or {}, None
        keys, values = (torch.stack(parts) for parts in zip(*pairs.values(), strict=True))
        first = self.plan.first_frame(chunk) * self.plan.frame_tokens
        numbers = torch.arange(first, first + self.plan.chunk_tokens, dtype=torch.int32)
        return keys, values, numbers.expand(*keys.shape[:3], -1)

    def _captures(self, chunk: int | Given) -> bool:
        """Whether a chunk is one that a run which goes on from here sees, and may be dropped before this one ends."""
        dropped_late = self.plan.kind == "stored" and not self.cuts_early
        if dropped_late or self.seen_by_next <= self.plan.clean_chunks or not isinstance(chunk, int):
            return False
        return self.may_stop or chunk >= self.schedule.total_chunks - self.seen_by_next

    def _keeps(self, chunk: int | Given) -> bool:
        """Whether a chunk is one that `begin_delta` is asked for; those that are given are in the first copy."""
        return bool(self.kept) and isinstance(chunk, int) and chunk >= self.schedule.prefix

    @property
    def movable(self) -> Collection[Movable]:
        """The history, which may leave the device."""
        return [self.history]

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history in use, and of its buffers."""
        return self.history.bytes_used, self.history.bytes

    def _weights(self, step: Step, oldest: bool) -> Mapping[str, float]:
        assert step.place.step is not None
        whole = self.schedule.whole_steps
        return self.sampling.mix(self.schedule.skipped + step.place.step, whole, self.distilled, oldest)

    def _clean_pass(self, chunk: int | Given, latent: Tensor) -> Step:
        return Step(latent, 1.0 - CLEAN_TIME, Place(chunk, None, 0))

    def _sweep(self, branch: str, steps: Sequence[Step]) -> list[Callable[[], Tensor]]:
        """Runs one branch of steps, behind the clean pass that waits; gives what makes the velocities. The last
        branch's clean pass becomes part of the history."""
        passes = list(self.waiting)
        stored = [step.place.chunk for step in passes] if branch == self.branches[-1] else []
        if stored and (self._captures(stored[0]) or self._keeps(stored[0])):
            self.history.captured = {}
        # Of the clean chunks that are there, before the layers put the new one in their place.
        copies = begin_delta({SHARED: self.history}, full=False) if stored and self._keeps(stored[0]) else None
        asking = steps[-1].place.chunk if steps and self.plan.asking else None

        def attend(layer: int, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chunk = step.place.chunk
            return self.history.attend(
                layer, chunk, q, k, v, self.attention, self._visible(step.place), keep_queries=chunk == asking
            )

        groups = run_layers(
            self.backbone, [*passes, *steps], lambda step: [self._context(step.place, branch)], 0,
            [self.history], attend, stored, check=self.check,
        )  # fmt: skip
        self.report.clean_passes += len(passes)
        if stored:
            if self.history.captured is not None:
                taken = self._taken(stored[0])
                if self._captures(stored[0]):
                    self.tail = [*self.tail, taken][-self.seen_by_next :]
                if copies is not None:
                    self.history.saved += self.plan.chunk_tokens
                    self.delta = partial(_with_chunk, copies, taken)
            self.waiting = []
            self._commit(stored)
        return [partial(self._headed, group.x, group.levels, group.hidden) for group in groups[len(passes) :]]

    def _commit(self, chunks: Sequence[int | Given]) -> None:
        self.history.commit(chunks)
        if self.cuts_early:
            self.history.cut_now()
        self.report.note(moved_note([self.history]), TOO_LITTLE)

    def _headed(self, x: Tensor, level: Tensor, hidden: Tensor) -> Tensor:
        for attempt in attempts([self.history]):
            with attempt:
                velocity = self.backbone.head(x, level, self.backbone.residual(x, hidden))
        return velocity

    def _alone(self, step: Step) -> Tensor:
        """The velocity of a chunk that sees itself alone, at position 0."""
        x, level = step.x, row_levels(step.sigma, step.x)
        positions = self.history.positions
        table, turn = positions.absolute_table(0), positions.rotate
        context = self._context(step.place, "alone")
        self.check()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(turn(q, table), turn(k, table), v)

        for attempt in attempts([self.history]):
            with attempt:
                residual = self.backbone.trunk(x, level, context, attend)
        return self.backbone.head(x, level, residual)

    def _visible(self, place: Place) -> int | None:
        """How many chunks before its own a chunk sees; None for all."""
        if place.step is None:
            return 0
        if not self.sampling.visible or self.settings.history.compression.rule != "window":
            return None
        step = self.schedule.skipped + place.step
        return visible_before(step, self.schedule.whole_steps, self.sampling.visible)

    def _context(self, place: Place, branch: str) -> MagiContext:
        """Conditioning of a chunk in a branch; all clean passes share theirs."""
        captioned = branch == "text" or self.distilled
        step = self.schedule.skipped + (place.step or 0)
        size = step_size(self.schedule.whole_steps, step, self.sampling.order) if self.distilled else None
        chunk = place.chunk if captioned and place.step is not None else None
        return self.context(chunk, captioned, size)


def _with_chunk(copies: Callable[[], SnapshotDelta], captured: Captured) -> SnapshotDelta:
    """What a history has grown by, with a chunk that has become clean since."""
    delta = copies()
    saved = delta.histories[SHARED]
    keys, values, tokens = (torch.cat([old, new], dim=3) for old, new in zip(saved[:3], captured, strict=True))
    return SnapshotDelta({SHARED: Snapshot(keys, values, tokens, saved.queries)}, delta.full)


def magi_forward(
    backbone: MagiBackbone,
    schedule: ChunkSchedule,
    settings: Settings,
    text: Callable[[int], MagiText],
    null: MagiText,
    *,
    shape: Sequence[int],
    device: torch.device,
    sampling: MagiSampling = MagiSampling(),
    attention: Attention = grouped_attention,
    loaded: Snapshot | None = None,
    kept: Kept = "",
    beside: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    may_stop: bool = False,
    make: Callable[..., MagiForward] = MagiForward,
) -> tuple[Policy, MagiForward]:
    """Makes a run's forward, with its memory planned and allocated, and says when it will be asked. Arguments are those
    of `magi_engine`; `may_stop` as for `MagiForward`."""
    own_budget = settings.history.budget  # what `magi_settings` sets where there is none is no cut
    settings = magi_settings(settings, sampling, schedule)
    policy, report = settings.reuse.policy(schedule), Report(schedule)
    report.notes += idle_notes(settings.reuse, schedule)
    itemsize, at_once = backbone.network.dtype.itemsize, not by_chunk(backbone)
    plan = magi_plan(backbone.config, schedule, settings, sampling, shape, itemsize, at_once)
    plan = placed(replace(plan, network=backbone.sizes), device, beside)  # one of several processes has a part of it
    if own_budget is not None:
        report.notes += uncut_notes(settings, schedule, CHUNK_FRAMES, joint=False, at_once=plan.kind == "shared")
    forward = make(
        backbone, schedule, settings, plan, report, text, null,
        policy=policy, device=device, sampling=sampling, attention=counted(attention, report), loaded=loaded,
        kept=kept, may_stop=may_stop, check=partial(check_cancelled, cancelled, report),
    )  # fmt: skip
    return policy, forward


def magi_engine(
    backbone: MagiBackbone,
    schedule: ChunkSchedule,
    settings: Settings,
    text: Callable[[int], MagiText],
    null: MagiText,
    start: Callable[[int], Tensor],
    *,
    shape: Sequence[int],
    device: torch.device,
    sampling: MagiSampling = MagiSampling(),
    given: Tensor | None = None,
    source: FromVideo | None = None,
    attention: Attention = grouped_attention,
    loaded: Snapshot | None = None,
    kept: Kept = "",
    beside: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
    steer: Callable[[Boundary], bool] | None = None,
    make: Callable[..., MagiForward] = MagiForward,
) -> Engine:
    """Makes a run ready to go; whole chunks that are given have been run.

    Args:
        backbone, schedule, settings, text, null, sampling, attention, loaded, kept: as for `MagiForward`.
        start: gives a chunk's noise [B, C, 6, H, W] from its number.
        shape: of a chunk.
        given: latent frames [B, C, T, H, W] before the first generated one, as `magi_schedule` was told.
        source: as for `magi_sampling`.
        beside: as for `engine.build.RunSettings`.
        on_progress, cancelled, steer: as for `Engine`.
        make: of the forward.

    Raises:
        UserError: settings that MAGI-1 cannot be run with, or given frames that are not the schedule's.
    """
    frames = 0 if given is None else given.shape[2]
    if loaded is None and frames // CHUNK_FRAMES != schedule.prefix:
        raise UserError(
            f"{frames} latent frames are given, but the schedule is one for {schedule.prefix} given chunks of "
            f"{CHUNK_FRAMES}: tell magi_schedule() how many frames are given, or load a state."
        )
    policy, forward = magi_forward(
        backbone, schedule, settings, text, null, shape=shape, device=device, sampling=sampling, attention=attention,
        loaded=loaded, kept=kept, beside=beside, cancelled=cancelled, may_stop=steer is not None, make=make,
    )  # fmt: skip
    settings = forward.settings
    denoising = magi_sampling(schedule, sampling, start, given, source)
    forward.report.notes += [] if source is None else [source.note(denoising.sigmas)]
    steered = {} if steer is None else {"steer": steer}
    engine = Engine(forward, schedule, policy, settings.between, denoising, on_progress, cancelled, **steered)
    if loaded is None and given is not None:
        for chunk in range(schedule.prefix):
            engine.give(chunk, given[:, :, chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES])
    return engine
