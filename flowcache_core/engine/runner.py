"""Chunks through the network, or their last results again: where reuse policy, forecast, history and backbone meet.

All chunks that are recomputed in a tick go through the network in one forward, oldest first within each layer, which
gives what one after another would give: a chunk sees the older ones' keys of the same layer, no more.

The runner is driven by the engine, or by a host's own sampler; guidance is its caller's.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..history.cache import History, grown, moved_note
from ..history.chunk_view import AttentionFunction, ChunkView
from ..history.offload import OUT_OF_MEMORY, spared
from ..history.settings import Given, HistoryShape
from ..history.snapshot import Clean, Grown
from ..history.streams import SideStream
from ..models.presets import Settings
from ..report import Report
from ..reuse.policies import Forecast, changes
from ..schedule import CLEAN, ChunkSchedule, Place
from ..solvers.noise_levels import row_levels
from ..solvers.weights import joined

FORWARD_TOKENS = 4096  # that go through the network at once, at most: enough to keep a device busy


class Step(NamedTuple):
    """What a chunk is asked for in a tick.

    Attributes:
        x: [B, C, T, H, W], its latent; or [branches * B, ...], branch after branch.
        sigma: its noise level.
        place: chunk and step; at step CLEAN keys and values are stored and the velocity is zero.
    """

    x: Tensor
    sigma: float
    place: Place


class Text(NamedTuple):
    """A chunk's text.

    Attributes:
        embedding: [branches * B, tokens, width].
        key: a name for it, under which its keys and values are kept for the run.
    """

    embedding: Tensor
    key: Hashable


class Runner:
    """State of one run: histories and forecasts by branch, the policy, the report.

    Args:
        backbone: runs one chunk, see `backbones.wan.WanBackbone`.
        schedule: of the run.
        settings: what to reuse and how much history to keep.
        chunk_frames: latent frames of a chunk.
        attention: used over the history.
        dtype: what the backbone computes in, where latents are kept in another type.
        lead, end: given frames that fill no chunk, before the first one and after the last.
    """

    def __init__(
        self,
        backbone,
        schedule: ChunkSchedule,
        settings: Settings,
        chunk_frames: int,
        attention: AttentionFunction = F.scaled_dot_product_attention,
        dtype: torch.dtype | None = None,
        lead: int = 0,
        end: int = 0,
    ):
        self.backbone = backbone
        self.schedule = schedule
        self.settings = settings
        self.chunk_frames = chunk_frames
        self.attention = attention
        self.dtype = dtype
        self.given = Given(lead, end, end_at=lead + schedule.total_chunks * chunk_frames)
        self.policy = settings.reuse.make(schedule)
        self.held: Literal["velocity", "residual", "clean"] = settings.reuse.held
        self.order = settings.reuse.order_on(schedule)
        self.recomputed: dict[int, bool] = {}  # of active chunks: whether their last step ran the network, all branches
        self.report = Report(schedule)
        self.histories: dict[Hashable, History] = {}
        self._loaded: dict[Hashable, Clean] = {}
        self._side: SideStream | None = None
        self._forecasts: dict[tuple[int, Hashable], Forecast] = {}
        self._signals: dict[int, Tensor] = {}
        self._changes: dict[int, float] = {}
        self._contexts: dict[Hashable, object] = {}

    def hold_clean(self) -> None:
        """For solvers that add fresh noise at every step: a velocity leads away from noise that is no longer there, so
        the clean estimate is held instead; each has seen another noise, so no line is put through them."""
        if self.held == "velocity":
            self.held, self.order = "clean", 0

    @property
    def corrects(self) -> bool:
        """Whether reused steps shall be corrected once the next recomputed velocity is known."""
        return self.settings.reuse.correct and self.held != "clean"

    def plan(self, steps: Sequence[Step]) -> None:
        """Begins a tick: makes room for chunks that begin, and measures, where the policy asks for it, how much each
        active chunk's signal has changed: one read-back from the device."""
        spared(lambda: self._open([step.place.chunk for step in steps]), self.histories.values())
        if not self.policy.watches:
            return
        signals = {
            place.chunk: self.backbone.reuse_signal(x.to(self.dtype or x.dtype), row_levels(sigma, x))
            for x, sigma, place in steps
        }
        self._changes = changes(signals, self._signals, self.policy.whole_window)
        self._signals = signals

    def _open(self, chunks: Sequence[int]) -> None:
        for history in self.histories.values():
            for chunk in chunks:
                if chunk not in history.active:
                    history.open(chunk)

    def forward(self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Sequence[Text]) -> Iterator[Tensor]:
        """Velocities of active chunks, for one or more branches of guidance.

        Args:
            steps: of a tick, oldest chunk first; what is told of the first ones is told before the last are run.
            branches: a name for each; names key histories and forecasts.
            texts: of each chunk.

        Yields:
            [branches * B, C, T, H, W] for each step.
        """
        again = [tuple(name for name in branches if self._recompute(step.place, name)) for step in steps]
        for step, names in zip(steps, again, strict=True):
            self.recomputed[step.place.chunk] = len(names) == len(branches)
            for name in branches:
                self.report.record(step.place, name, name in names)
        fresh: dict[int, Tensor] = {}
        for at, (step, names) in enumerate(zip(steps, again, strict=True)):
            if names and at not in fresh:
                together = self._together(at, steps, again, texts)
                velocities = self._recomputed([steps[i] for i in together], branches, names, texts[at])
                fresh |= zip(together, velocities, strict=True)
            if step.place.step == CLEAN:
                yield torch.zeros_like(step.x)
            elif len(names) == len(branches):
                yield fresh[at]
            else:
                yield self._reused(step, branches)

    def _together(self, first: int, steps: Sequence[Step], again: Sequence[tuple], texts: Sequence[Text]) -> list[int]:
        """Which steps go through the network with the first one: those that follow and need the same of it."""
        together: list[int] = []
        for at in range(first, len(steps)):
            if not again[at]:
                continue
            same_text = texts[at].key in {texts[first].key}  # a look-up tells tensors in it by identity
            full = together and self._tokens(steps[first].x) * (len(together) + 1) > FORWARD_TOKENS
            if again[at] != again[first] or not same_text or full:
                break
            together.append(at)
        return together

    def _tokens(self, x: Tensor) -> int:
        rows, columns = self.backbone.grid(*x.shape[-2:])
        return x.shape[0] * x.shape[2] * rows * columns

    def _recomputed(
        self, steps: Sequence[Step], branches: Sequence[Hashable], again: Sequence[Hashable], text: Text
    ) -> Sequence[Tensor]:
        """Velocities of chunks in those branches that are asked for again, from one forward."""
        begun = time.perf_counter()
        kept = [i for i, name in enumerate(branches) if name in again]
        steps = [step._replace(x=_rows(step.x, kept, len(branches))) for step in steps]
        context = self._context(_rows(text.embedding, kept, len(branches)), (text.key, tuple(again)))
        velocities = spared(lambda: self._run(steps, again, context), self.histories.values())
        self.report.forward_seconds += time.perf_counter() - begun
        return velocities

    def _reused(self, step: Step, branches: Sequence[Hashable]) -> Tensor:
        """A velocity of which no branch, or not every one, has just been recomputed."""
        x, sigma, place = step
        results = [self._forecasts[place.chunk, name].at(place.step) for name in branches]
        result = joined(results, dim=0)
        if self.held == "clean":
            return (x - result) / sigma
        if self.held == "residual":
            begun = time.perf_counter()
            result = self.backbone.head(x, row_levels(sigma, x), result)
            self.report.forward_seconds += time.perf_counter() - begun
        return result

    def reuses(self, place: Place) -> bool:
        """Whether a step is reused in every branch, where that is certain before its input is looked at.

        If so it is reported, and `forward` need not be called for it.
        """
        if place.step == CLEAN or self.policy.watches or self.held == "residual" or not self.histories:
            return False
        if any(self._recompute(place, name) for name in self.histories):
            return False
        for name in self.histories:
            self.report.record(place, name, False)
        self.recomputed[place.chunk] = False
        return True

    def commit(self, chunk: int) -> None:
        """A finished chunk joins the clean history; what was kept for its next steps is dropped."""
        for name, history in self.histories.items():
            history.commit(chunk)
            self._forecasts.pop((chunk, name), None)
        self._signals.pop(chunk, None)
        self.recomputed.pop(chunk, None)
        self.report.note(moved_note(self.histories.values()), OUT_OF_MEMORY)
        self.report.history_bytes_allocated = sum(history.bytes for history in self.histories.values())

    def load(self, histories: dict[Hashable, Clean]) -> None:
        """Starts from the clean history of an earlier run."""
        self._loaded = dict(histories)

    def save(self) -> dict[Hashable, Clean]:
        """The clean history of every branch, on the CPU."""
        return {name: history.save() for name, history in self.histories.items()}

    def save_new(self, anew: bool) -> Callable[[], Grown]:
        """Begins to copy what the clean history of every branch has grown by since the last call or `load`; `anew`: all
        of it. Call what it gives for the copies."""
        return grown(self.histories, anew)

    @property
    def history_bytes_used(self) -> int:
        return sum(history.bytes_used for history in self.histories.values())

    def shape(self, x: Tensor, batch: int) -> HistoryShape:
        """Sizes of a branch's history for chunks of x's shape."""
        backbone = self.backbone
        return HistoryShape(
            layers=backbone.layers,
            batch=batch,
            heads=getattr(backbone, "kv_heads", backbone.heads),
            head_dim=backbone.head_dim,
            grid=backbone.grid(*x.shape[-2:]),
            chunk_frames=self.chunk_frames,
            capacity=self.settings.history.capacity(self.schedule),
            given=self.given,
        )

    def plan_history(self, x: Tensor, branches: int) -> None:
        """Tells the report, before a run, how large its history will be.

        Args:
            x: a chunk [B, C, T, H, W]; only its shape and type matter.
            branches: of guidance.
        """
        shape, itemsize = self.shape(x, x.shape[0]), (self.dtype or x.dtype).itemsize
        whole = replace(shape, capacity=self.schedule.total_chunks)
        self.report.history_bytes_planned = branches * shape.planned_bytes(self.settings.history, itemsize)
        self.report.history_bytes_unbounded = branches * whole.bytes(itemsize)

    def _recompute(self, place: Place, branch: Hashable) -> bool:
        if place.step == CLEAN:
            return True
        steps = self.schedule.steps_of(place.chunk)
        decided = self.policy.recompute(place, steps, branch, self._changes.get(place.chunk))
        return decided or (place.chunk, branch) not in self._forecasts

    def _run(self, steps: Sequence[Step], branches: Sequence[Hashable], context) -> Sequence[Tensor]:
        rows = steps[0].x.shape[0] // len(branches)
        views = [[self._history(name, step.x, rows).view(step.place.chunk) for name in branches] for step in steps]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chunks = zip(*(part.chunk(len(steps), dim=2) for part in (q, k, v)), strict=True)
            return joined([attend_chunk(layer, chunk, *qkv) for chunk, qkv in zip(views, chunks, strict=True)], dim=2)

        def attend_chunk(layer: int, chunk: Sequence[ChunkView], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            branch = zip(chunk, q.split(rows), k.split(rows), v.split(rows), strict=True)
            return joined([view.attend(layer, q, k, v, self.attention) for view, q, k, v in branch], dim=0)

        x = joined([step.x for step in steps], dim=2)
        levels = _levels(steps)
        residual = self.backbone.trunk(x, levels, context, attend)
        residuals = residual.chunk(len(steps), dim=1)
        velocities = self.backbone.head(x, levels, residual).chunk(len(steps), dim=2)
        for step, velocity, residual in zip(steps, velocities, residuals, strict=True):
            if step.place.step != CLEAN:
                self._keep(step, branches, residual if self.held == "residual" else velocity)
        return velocities

    def _keep(self, step: Step, branches: Sequence[Hashable], result: Tensor) -> None:
        """Remembers what a recomputed step gave, for those that will be reused."""
        kept = step.x - step.sigma * result if self.held == "clean" else result
        for name, part in zip(branches, kept.split(kept.shape[0] // len(branches)), strict=True):
            forecast = self._forecasts.setdefault((step.place.chunk, name), Forecast(self.order))
            forecast.add(step.place.step, part)

    def _history(self, branch: Hashable, x: Tensor, batch: int) -> History:
        if branch not in self.histories:
            shape = self.shape(x, batch)
            history = History(shape, self.backbone.rotary, self.settings.history, x.dtype, x.device, self._side_of(x))
            if self._loaded:
                if branch not in self._loaded:
                    raise UserError(
                        f"The state holds history for the branches {sorted(map(str, self._loaded))}, not for "
                        f"'{branch}': extend with the guidance that it was made with."
                    )
                history.load(self._loaded[branch])
            self.histories[branch] = history
            whole = replace(shape, capacity=self.schedule.total_chunks)
            self.report.history_bytes_unbounded = len(self.histories) * whole.bytes(history.dtype.itemsize)
        return self.histories[branch]

    def _side_of(self, x: Tensor) -> SideStream:
        """One for all branches."""
        self._side = self._side or SideStream(x.device, self.settings.overlap)
        return self._side

    def _context(self, text: Tensor, key: Hashable):
        """Cross-attention keys and values of a text: made once, kept for as many texts as chunks can be active."""
        if key not in self._contexts:
            if len(self._contexts) > 2 * self.schedule.max_active:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[key] = self.backbone.context(text)
        return self._contexts[key]


def _rows(x: Tensor, kept: Sequence[int], groups: int) -> Tensor:
    """The row groups `kept` of x; x itself where that is all of them."""
    return x if len(kept) == groups else torch.cat([x.chunk(groups)[i] for i in kept])


def _levels(steps: Sequence[Step]) -> Tensor:
    """Noise levels of steps that are run together: of rows [rows], or of frames [rows, T] where steps are several."""
    if len(steps) == 1:
        return row_levels(steps[0].sigma, steps[0].x)
    return torch.cat([row_levels(step.sigma, step.x)[:, None].expand(-1, step.x.shape[2]) for step in steps], dim=1)
