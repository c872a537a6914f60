"""One chunk through the network, or its last result again: where reuse policy, forecast, history and backbone meet.

The runner is driven by the engine, or by a host's own sampler; guidance is its caller's.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk_view import AttentionFunction
from .clean_history import Clean, Grown
from .errors import UserError
from .history import History, grown, moved_note
from .history_settings import Given, HistoryShape
from .moving import OUT_OF_MEMORY, spared
from .noise_levels import row_levels
from .presets import Settings
from .report import Report
from .reuse import Forecast, changes
from .schedule import CLEAN, ChunkSchedule, Place


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
        self.recomputed = True  # whether the last forward ran the network for all its branches
        self.report = Report(schedule)
        self.histories: dict[Hashable, History] = {}
        self._loaded: dict[Hashable, Clean] = {}
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

    def plan(self, places: Sequence[Place], latents: Sequence[Tensor], sigmas: Sequence[float]) -> None:
        """Measures, before a tick, how much each active chunk's signal has changed: one read-back from the device.

        Args:
            places: the active chunks' steps.
            latents, sigmas: their inputs [B, C, T, H, W] and noise levels.
        """
        if not self.policy.watches:
            return
        signals = {
            place.chunk: self.backbone.reuse_signal(x.to(self.dtype or x.dtype), row_levels(sigma, x))
            for place, x, sigma in zip(places, latents, sigmas, strict=True)
        }
        self._changes = changes(signals, self._signals, self.policy.whole_window)
        self._signals = signals

    def forward(
        self, x: Tensor, sigma: float, place: Place, branches: Sequence[Hashable], text: Tensor, text_key: Hashable
    ) -> Tensor:
        """Velocity of a chunk for one or more branches of guidance.

        Args:
            x: [branches * B, C, T, H, W], branch after branch.
            sigma: noise level of this step.
            place: chunk and step; at step CLEAN keys and values are stored and the result is zero.
            branches: a name for each; names key histories and forecasts.
            text: text embedding, [branches * B, tokens, width].
            text_key: a name for that text, under which its keys and values are kept for the run.

        Returns:
            Velocities of x's shape.
        """
        rows = x.shape[0] // len(branches)
        again = [name for name in branches if self._recompute(place, name)]
        self.recomputed = len(again) == len(branches)
        for name in branches:
            self.report.record(place, name, name in again)
        if again:
            begun = time.perf_counter()
            kept = [i for i, name in enumerate(branches) if name in again]
            part = _rows(x, kept, rows, len(branches))
            context = self._context(_rows(text, kept, rows, len(branches)), (text_key, tuple(again)))
            fresh = spared(lambda: self._run(part, sigma, place, again, context), self.histories.values())
            self.report.forward_seconds += time.perf_counter() - begun
        if place.step == CLEAN:
            return torch.zeros_like(x)
        if len(again) == len(branches):
            return fresh
        results = [self._forecasts[place.chunk, name].at(place.step) for name in branches]
        result = results[0] if len(results) == 1 else torch.cat(results)
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
        self.recomputed = False
        return True

    def commit(self, chunk: int) -> None:
        """A finished chunk joins the clean history; what was kept for its next steps is dropped."""
        for name, history in self.histories.items():
            history.commit(chunk)
            self._forecasts.pop((chunk, name), None)
        self._signals.pop(chunk, None)
        self.report.note(moved_note(self.histories.values()), OUT_OF_MEMORY)
        self.report.history_bytes_allocated = sum(history.bytes for history in self.histories.values())
        self.report.chunks_done += chunk >= self.schedule.prefix

    def load(self, histories: dict[Hashable, Clean]) -> None:
        """Starts from the clean history of an earlier run."""
        self._loaded = dict(histories)

    def save(self) -> dict[Hashable, Clean]:
        """The clean history of every branch, on the CPU."""
        return {name: history.save() for name, history in self.histories.items()}

    def save_new(self, anew: bool) -> Grown:
        """What the clean history of every branch has grown by since the last call or `load`; `anew`: all of it."""
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

    def _run(self, x: Tensor, sigma: float, place: Place, branches: Sequence[Hashable], context) -> Tensor:
        rows = x.shape[0] // len(branches)
        views = [self._history(name, x, rows).view(place.chunk) for name in branches]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(views) == 1:
                return views[0].attend(layer, q, k, v, self.attention)
            parts = zip(views, q.split(rows), k.split(rows), v.split(rows), strict=True)
            return torch.cat([view.attend(layer, q, k, v, self.attention) for view, q, k, v in parts])

        levels = row_levels(sigma, x)
        residual = self.backbone.trunk(x, levels, context, attend)
        if place.step == CLEAN:
            return residual
        velocity = self.backbone.head(x, levels, residual)
        kept = residual if self.held == "residual" else velocity
        if self.held == "clean":
            kept = x - sigma * velocity
        for name, part in zip(branches, kept.split(rows), strict=True):
            forecast = self._forecasts.setdefault((place.chunk, name), Forecast(self.order))
            forecast.add(place.step, part)
        return velocity

    def _history(self, branch: Hashable, x: Tensor, batch: int) -> History:
        if branch not in self.histories:
            shape = self.shape(x, batch)
            history = History(shape, self.backbone.rotary, self.settings.history, x.dtype, x.device)
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

    def _context(self, text: Tensor, key: Hashable):
        """Cross-attention keys and values of a text: made once, kept for as many texts as chunks can be active."""
        if key not in self._contexts:
            if len(self._contexts) > 2 * self.schedule.max_active:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[key] = self.backbone.context(text)
        return self._contexts[key]


def _rows(x: Tensor, kept: Sequence[int], rows: int, groups: int) -> Tensor:
    """The row groups `kept` of x; x itself where that is all of them."""
    return x if len(kept) == groups else torch.cat([x[i * rows : (i + 1) * rows] for i in kept])
