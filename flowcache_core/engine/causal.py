"""Chunk after chunk over a history of clean ones: how causal models see."""

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..history.cache import Attention, History, begin_delta, moved_note
from ..history.offload import TOO_LITTLE, Movable, attempts
from ..history.plan import MemoryPlan
from ..history.positions import Positions
from ..history.snapshot import Snapshot, SnapshotDelta
from ..history.streams import SideStream
from ..report import Report
from ..reuse.forecast import Forecast
from ..schedule import Given, Place, Rerun
from ..settings import Settings
from ..solvers.weights import joined, joined_heads
from .anew import AnewHistory
from .contexts import Contexts, texts_kept
from .forward import Step, Velocity
from .guidance import Again, Guidance, Texts
from .layers import Group, by_chunk, levels_of, run_layers, stacks_of
from .shots import Shots
from .sites import Sites


class CausalSite:
    """What a run keeps on one device.

    Args:
        backbone, device, plan, settings: of the run, or another device's backbone.

    Attributes:
        histories: of the branches that have been run there.
    """

    def __init__(self, backbone: Any, device: torch.device, plan: MemoryPlan, settings: Settings):
        self.backbone = backbone
        self.stream = SideStream(device, settings.overlap)
        self.positions = Positions(plan, backbone.rotary, device)
        self.contexts = Contexts(backbone.context, texts_kept(plan.max_active))
        self.histories: dict[Hashable, History] = {}


class CausalForward:
    """The forwards of one run.

    Args:
        backbone: by layers, see `models.wan.WanBackbone`.
        guidance: which branches are run, and their sum.
        plan: of the memory, which is allocated here.
        settings: of the run.
        report: of the run.
        aligned: all active chunks recompute on the same ticks: none needs another's keys of an earlier tick.
        dtype, device: that is computed with.
        attention: over the history.
        loaded: clean history of an earlier run to start from, by branch.
        order: of the forecast of residuals, where those are held.
        check: called before every group of every layer; may raise to end the run.
        anew: which finished frames are run once more when; for a run of one chunk after the other.
        shots: of the video, of a family that makes them; for such a run as well.
    """

    def __init__(
        self,
        backbone,
        guidance: Guidance,
        plan: MemoryPlan,
        settings: Settings,
        report: Report,
        *,
        aligned: bool,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention = F.scaled_dot_product_attention,
        loaded: Mapping[Hashable, Snapshot] | None = None,
        order: int = 0,
        check: Callable[[], None] = lambda: None,
        anew: AnewHistory | None = None,
        shots: Shots | None = None,
    ):
        self.backbone, self.guidance, self.attention = backbone, guidance, attention
        self.plan, self.settings, self.report, self.check = plan, settings, report, check
        self.dtype, self.device, self.anew, self.shots = dtype, device, anew, shots
        self.keeps_slots = by_chunk(backbone) or not (aligned and guidance.at_once and settings.clean_pass)
        # Where layers have no scratch in common for want of order, a cut comes when it would come with one.
        self.cuts_early = by_chunk(backbone) and aligned and settings.clean_pass and plan.max_active > 1
        self.sites = Sites(backbone, device, lambda one, where: CausalSite(one, where, plan, settings))
        self.loaded = dict(loaded or {})
        self.spare = [self._history(self.sites.home) for _ in range(plan.branches)]  # not yet of a branch
        self.holds_residual = settings.holds_residual
        self.order = order
        self.held: dict[tuple[int | Given, Hashable], Forecast] = {}  # residuals, by chunk and branch
        self.waiting: list[Step] = []  # clean passes that go along with the next forward
        report.history_bytes_planned = plan.history_bytes
        report.history_bytes_unbounded = plan.unbounded_bytes
        report.history_bytes_allocated = self.history_bytes[1]

    @property
    def histories(self) -> dict[Hashable, History]:
        """Of every branch, wherever it is run."""
        return {name: history for site in self.sites for name, history in list(site.histories.items())}

    def mix(self, step: Step, oldest: bool) -> Hashable:
        """Names the sum of branches that a step's velocity will be, and of which of several networks."""
        first = stacks_of(self.backbone, step)[0].first
        return (self.guidance.mix(step), first) if first else self.guidance.mix(step)

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        """What a policy watches for change, for each step."""
        return [self.backbone.reuse_signal(step.x.to(self.dtype), levels_of(step)) for step in steps]

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the network for a tick's steps and the clean passes that wait, oldest chunk first."""
        if self.anew is not None and steps[0].place.step == 0:
            self._compute_anew(self.anew, steps[0])
        if self.shots is not None:
            steps = self._in_shots(self.shots, steps)
        passes, self.waiting = self.waiting, []
        values, branches = self._run([*passes, *steps])
        return [
            Velocity(value, branches, step.recompute) for value, step in zip(values[len(passes) :], steps, strict=True)
        ]

    def _in_shots(self, shots: Shots, steps: Sequence[Step]) -> list[Step]:
        """Steps of the one active chunk, which stands in its shot."""
        chunk = steps[0].place.chunk
        if steps[0].place.step == 0 and isinstance(chunk, int):
            shots.start(chunk)
            self.report.shot = shots.shot
            self.report.began_shots(shots.chunks)
        return [step._replace(place=replace(step.place, chunk=shots.place(step.place.chunk))) for step in steps]

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Runs given frames [B, C, T, H, W], shown at a noise level, and stores their keys and values."""
        self._run([Step(latent, condition, Place(chunk, None, 0))])
        if self.anew is not None and chunk is not Given.END:
            self.anew.take(latent)
            self.anew.show(self.guidance.texts_of(chunk))

    def _compute_anew(self, anew: AnewHistory, step: Step) -> None:
        """Runs finished frames once more before a chunk begins, where their family has it so."""
        chunk = step.place.chunk
        assert isinstance(chunk, int)
        parts = anew.parts if anew.show(self.guidance.texts_of(chunk)) else []
        if parts:
            always = anew.rule.always
            told = max(chunk - 1, self.report.schedule.prefix) if always else chunk
            for part in parts:
                place = Place(Rerun(told, part.frames), None, step.place.tick)
                _, branches = self._run([Step(part.latents.to(step.x), 0.0, place)])
                self.report.reruns += len(branches)
            self.report.reran(chunk, always, anew.missing)
        self.report.shown = anew.shown

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk. Its clean pass goes along with the next forward, but is made now where the history is
        bounded, for it may be cut before that, and where it is the only chunk: then a run that goes on from it has the
        same bits. A short one is the last, which nobody looks at."""
        if latent.shape[2] < self.plan.chunk_frames:
            return
        if self.anew is not None:
            self.anew.take(latent)
        if not self.settings.clean_pass:
            self.commit([chunk])
            return
        placed = chunk if self.shots is None else self.shots.place(chunk)
        self.waiting.append(Step(latent, 0.0, Place(placed, None, 0)))
        if self.settings.history.bounded or self.plan.max_active == 1:
            self.settle()

    def settle(self) -> None:
        """Makes the clean passes that wait."""
        passes, self.waiting = self.waiting, []
        for step in passes:
            self._run([step])

    @property
    def settled(self) -> bool:
        """Whether all finished chunks have had their clean pass."""
        return not self.waiting

    def save(self) -> dict[Hashable, Snapshot]:
        """Copies the clean history of every branch to the CPU."""
        return {name: history.save() for name, history in self.histories.items()}

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Begins to copy what the clean history has grown by."""
        self.settle()
        return begin_delta(self.histories, full, self.report.shown, self.report.shot)

    @property
    def movable(self) -> Collection[Movable]:
        """Histories that may leave the device."""
        return list(self.histories.values())

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history in use, and of its buffers."""
        histories = [*self.histories.values(), *self.spare]
        return sum(history.bytes_used for history in histories), sum(history.bytes for history in histories)

    def _run(self, steps: Sequence[Step]) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Guided velocities of steps, and the branches that they are sums of."""
        passes = [step for step in steps if step.place.is_clean_pass]
        stored = [step.place.chunk for step in passes]
        values, branches = self.guidance.velocities(steps, self.network)
        forwards = sum(len(stacks_of(self.backbone, step)) for step in passes)
        self.report.clean_passes += forwards * sum(not isinstance(name, Again) for name in branches)
        self.commit(stored)
        return values, branches

    def commit(self, chunks: Sequence[int | Given]) -> None:
        """Makes chunks clean, whose keys and values are stored."""
        for history in self.histories.values():
            history.commit(chunks)
            if self.cuts_early:
                history.cut_now()
        for key in [key for key in self.held if key[0] in chunks]:
            del self.held[key]
        if chunks:
            self.report.note(moved_note(self.histories.values()), TOO_LITTLE)
            self.report.history_bytes_allocated = self.history_bytes[1]

    def network(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        """Runs the network for some branches of a tick's steps; see `guidance.Network`."""
        begun, site = time.perf_counter(), self.sites.of(backbone, steps[0].x.device)
        again = [step.recompute or self._unheld(step, branches) for step in steps]
        asked = [step for step, run in zip(steps, again, strict=True) if run]
        values = iter(self._recomputed(site, asked, branches, texts) if asked else [])
        results = [
            next(values) if run else self._reused(site, step, branches) for step, run in zip(steps, again, strict=True)
        ]
        if site is self.sites.home:  # others are busy at the same time
            self.report.forward_seconds += time.perf_counter() - begun
        return results

    def _recomputed(
        self, site: CausalSite, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts
    ) -> list[Tensor]:
        rows = steps[0].x.shape[0] // len(branches)
        histories = [self._history_of(name.branch if isinstance(name, Again) else name, site) for name in branches]
        leaves = [not isinstance(name, Again) for name in branches]
        stored = [step.place.chunk for step in steps if step.place.is_clean_pass]
        asking = self._asking(steps)

        def contexts(step: Step) -> list:
            return [site.contexts.of(text) for text in texts(step.place.chunk)]

        def attend(layer: int, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            chunk, parts = step.place.chunk, zip(histories, leaves, *(x.split(rows) for x in (q, k, v)), strict=True)
            answers = [
                history.attend(layer, chunk, q, k, v, self.attention, keep_queries=chunk == asking)
                if kept
                else history.look(chunk, q, k, v, self.attention)
                for history, kept, q, k, v in parts
            ]
            return joined_heads(answers)

        for network, first in stacks_of(site.backbone, steps[0]):
            together = self.plan.together if network.patches is None else 1
            groups = run_layers(
                network, steps, contexts, together, list(dict.fromkeys(histories)), attend, stored,
                site.histories.values(), self.check, first,
            )  # fmt: skip
        return [velocity for group in groups for velocity in self._headed(site, network, group, branches)]

    def _headed(self, site: CausalSite, network: Any, group: Group, branches: Sequence[Hashable]) -> Sequence[Tensor]:
        """Velocities of a group's chunks, from what a network's blocks gave."""
        count, every = len(group.steps), site.histories.values()
        for attempt in attempts(every):
            with attempt:
                residual = network.residual(group.x, group.hidden)
        if self.holds_residual:
            for step, part in zip(group.steps, residual.chunk(count, dim=1), strict=True):
                self._hold(step.place, self._held_names(step, branches), part)
        for attempt in attempts(every):
            with attempt:
                velocities = network.head(group.x, group.levels, residual).chunk(count, dim=2)
        return velocities

    def _hold(self, place: Place, branches: Sequence[Hashable], residual: Tensor) -> None:
        if place.step is not None:
            for name, part in zip(branches, residual.chunk(len(branches)), strict=True):
                self.held.setdefault((place.chunk, name), Forecast(self.order)).add(place.step, part)

    def _held_names(self, step: Step, branches: Sequence[Hashable]) -> Sequence[Hashable]:
        """What the residuals of a step's branches are held under; those of several networks are held apart."""
        first = stacks_of(self.backbone, step)[0].first
        return [(name, first) for name in branches] if first else branches

    def _unheld(self, step: Step, branches: Sequence[Hashable]) -> bool:
        """Whether a step that may be reused is of a branch that was not there before."""
        return any((step.place.chunk, name) not in self.held for name in self._held_names(step, branches))

    def _reused(self, site: CausalSite, step: Step, branches: Sequence[Hashable]) -> Tensor:
        """The head alone, over held residuals."""
        assert step.place.step is not None
        names = self._held_names(step, branches)
        held = [self.held[step.place.chunk, name].at(step.place.step) for name in names]
        ((network, _),) = stacks_of(site.backbone, step)
        return network.head(step.x, levels_of(step), joined(held))

    def _asking(self, steps: Sequence[Step]) -> int | Given | None:
        """The chunk whose queries are kept for the next cut: never one that is finished, and of the older ones the
        first that goes on, which is the oldest when a cut finds the next one finished."""
        if not self.plan.asking:
            return None
        active = [step.place for step in steps if not step.place.is_clean_pass]
        if not active:
            return None
        if self.settings.history.compression.asking == "newest":
            return active[-1].chunk
        return next((place.chunk for place in active if self._goes_on(place)), active[0].chunk)

    def _goes_on(self, place: Place) -> bool:
        """Whether a chunk has a step after this one."""
        assert isinstance(place.chunk, int) and place.step is not None
        return place.step + 1 < self.report.schedule.steps_of(place.chunk)

    def _history_of(self, branch: Hashable, site: CausalSite) -> History:
        if branch not in site.histories:
            spare = self.spare.pop() if self.spare else None  # of the run's own device; elsewhere its memory is freed
            history = spare if spare and site is self.sites.home else self._history(site)
            if self.loaded:
                if branch not in self.loaded:
                    raise UserError(
                        f"The state holds history for the branches {sorted(map(str, self.loaded))}, not for "
                        f"'{branch}': extend with the guidance that it was made with."
                    )
                history.load(self.loaded[branch])
            site.histories[branch] = history
        return site.histories[branch]

    def _history(self, site: CausalSite) -> History:
        settings = self.settings.history
        made = History(self.plan, site.positions, settings, self.dtype, self.keeps_slots, site.stream)
        if self.shots is not None:
            made.shot = self.shots.shot.begins
        return made
