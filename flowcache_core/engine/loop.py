"""The loop: tick by tick, every active chunk one step further, oldest first; finished chunks are handed out."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..history.snapshot import Snapshot, SnapshotDelta
from ..report import Report
from ..reuse.forecast import Weights
from ..reuse.policies import Policy, relative_change
from ..schedule import ChunkSchedule, Given, Place
from ..settings import Between
from ..solvers.one_step import Euler, SolverFactory, no_noise
from ..solvers.weights import lagrange
from .chunk import ActiveChunk, Held
from .counted import peak_bytes, reset_peak
from .forward import Forward, Step
from .idle import unreached_notes


class Cancelled(Exception):
    """The run was cancelled by its caller."""


def check_cancelled(cancelled: Callable[[], bool], report: Report) -> None:
    """Raises Cancelled where the caller wants the run to end."""
    if cancelled():
        raise Cancelled(f"Cancelled after {report.chunks_done} of {report.schedule.chunks} chunks.")


class Chunk(NamedTuple):
    """A finished chunk.

    Attributes:
        number: in the video; prefix chunks count.
        latent: [B, C, T, H, W].
    """

    number: int
    latent: Tensor


class Boundary(NamedTuple):
    """What lies ahead between two ticks.

    Attributes:
        chunk: the first that has not begun; the number of all chunks where none is left.
        begins: whether it begins in the next tick.
    """

    chunk: int
    begins: bool


@dataclass(frozen=True)
class Progress:
    """Told after every tick: ticks done and in all, the chunks that took a step, and how many are finished."""

    tick: int
    ticks: int
    places: Sequence[Place]
    finished: int


@dataclass(frozen=True)
class Sampling:
    """How chunks are denoised.

    Attributes:
        sigmas: noise levels of a chunk's steps, [steps + 1], falling to 0; where they end above it, nothing of the
            chunk is kept as history.
        start: gives a chunk's latent [B, C, T, H, W] at the first noise level, from its number.
        noise: fresh unit noise for a chunk and step, for solvers that add some.
        solver: makes a chunk's solver.
        first_sigmas: noise levels of the first generated chunk where it takes more steps.
        held: what is forecast, see `ActiveChunk`.
        pinned: puts frames that are given inside a chunk into its latent, before every step and where it is stored.
        given: counts those of a chunk that it begins with, which are shown without noise and handed out with it.
        recompute_last_tick: nothing is reused in the run's last tick.
    """

    sigmas: Sequence[float]
    start: Callable[[int], Tensor]
    noise: Callable[[int, int], Tensor] = no_noise
    solver: SolverFactory = Euler
    first_sigmas: Sequence[float] | None = None
    held: Held = "velocity"
    pinned: Callable[[int, Tensor], Tensor] = lambda chunk, latent: latent
    given: Callable[[int], int] = lambda chunk: 0
    recompute_last_tick: bool = False

    def levels(self, chunk: int, schedule: ChunkSchedule) -> Sequence[float]:
        """Noise levels of a chunk."""
        return self.first_sigmas or self.sigmas if chunk == schedule.prefix else self.sigmas


def beginning_with(sampling: Sampling, first: int, given: Tensor | None) -> Sampling:
    """The same, whose first chunk begins with given frames [B, C, T, H, W].

    Source: LongLive 2.0, pipeline/causal_diffusion_inference.py (`clamp_i2v_first_chunk`).
    """
    if given is None:
        return sampling
    count = given.shape[2]

    def pinned(chunk: int, latent: Tensor) -> Tensor:
        return torch.cat([given.to(latent), latent[:, :, count:]], dim=2) if chunk == first else latent

    return replace(sampling, pinned=pinned, given=lambda chunk: count if chunk == first else 0)


class Engine:
    """One run: a generator of finished chunks.

    Args:
        forward: runs the network, and holds the history.
        schedule: of the run.
        policy: when to recompute.
        between: what stands in otherwise.
        sampling: how chunks are denoised.
        on_progress: called after every tick.
        cancelled: asked before every forward; True ends the run with `Cancelled`.
        steer: asked between ticks, and before the first. It may change what the guidance shows the chunks that have not
            begun. True ends the run with the next chunk that is finished, or at once where none is active.
    """

    def __init__(
        self,
        forward: Forward,
        schedule: ChunkSchedule,
        policy: Policy,
        between: Between,
        sampling: Sampling,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
        steer: Callable[[Boundary], bool] = lambda ahead: False,
    ):
        self.forward, self.schedule, self.policy = forward, schedule, policy
        self.sampling, self.on_progress, self.cancelled, self.steer = sampling, on_progress, cancelled, steer
        self.report = forward.report
        self.active: list[ActiveChunk] = []  # oldest first
        self.advanced: list[ActiveChunk] = []  # those that took a step in the last tick, finished ones too
        self.held: Held = "clean" if getattr(sampling.solver, "adds_noise", False) else sampling.held
        # Each clean estimate has seen another noise, so no line is put through them.
        self.order = 0 if self.held == "clean" else between.order_for(policy, schedule.steps)
        self.corrects = between.correct
        self.forecast_weights: Weights = lagrange
        self.weighed: list[float] = []  # the least that a step added to its chunk's drift, where that was looked at
        for chunk in {schedule.indices[0], schedule.indices[-1]}:
            steps, levels = schedule.steps_of(chunk), sampling.levels(chunk, schedule)
            if len(levels) != steps + 1:
                raise ValueError(
                    f"Chunk {chunk} takes {steps} steps and needs {steps + 1} noise levels, got {len(levels)}."
                )

    @torch.inference_mode()
    def give(self, chunk: int | Given, latent: Tensor, condition: float = 0.0) -> None:
        """Runs given frames [B, C, T, H, W], so that generated chunks attend to them: a lead and whole chunks oldest
        first, then an end, which comes after the last chunk and is seen by all.

        Args:
            condition: noise level that they are shown at.
        """
        with self._timed():
            check_cancelled(self.cancelled, self.report)
            self.forward.give(chunk, latent, condition)

    def run(self) -> Iterator[Chunk]:
        """Generates the schedule's chunks, oldest first, or as many as `steer` lets it."""
        stops = False
        for tick, places in enumerate(self.schedule):
            with self._timed():
                stops = self._steered(places) or stops
                if stops and self.report.chunks_done and not self.active:
                    break
                finished = self._tick(tick, places)
            done = self.schedule.prefix + self.report.chunks_done
            if tick + 1 == self.schedule.ticks and self.policy.watches and not self.report.reused:
                self.report.notes += unreached_notes(self.policy, self.weighed)
            self.on_progress(Progress(tick + 1, self.schedule.ticks, places, done))
            yield from finished
            if stops and finished:
                break
        if self.report.chunks_done < self.schedule.chunks:
            self.report.notes.append(f"stopped after {self.report.chunks_done} of {self.schedule.chunks} chunks")

    @torch.inference_mode()
    def _steered(self, places: Sequence[Place]) -> bool:
        """Asks whether the run shall end, before a tick of these places."""
        starting = [place.chunk for place in places if place.step == 0 and isinstance(place.chunk, int)]
        begun = [chunk.index for chunk in self.active]
        ahead = starting[0] if starting else max(begun, default=self.schedule.prefix - 1) + 1
        return self.steer(Boundary(ahead, bool(starting)))

    @torch.inference_mode()
    def save(self) -> dict[Hashable, Snapshot]:
        """Copies the clean history of every branch to the CPU, with all chunks that were handed out."""
        with self._timed():
            self.forward.settle()
        return self.forward.save()

    @property
    def settled(self) -> bool:
        """Whether `begin_delta` changes nothing of what follows. Where several chunks are active, a finished one's keys
        come with the next forward."""
        return self.forward.settled

    @torch.inference_mode()
    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """Begins to copy what that history has grown by since the last call or since it was loaded; `full`: all of it.
        Call what it gives for the copies."""
        with self._timed():
            return self.forward.begin_delta(full)

    @torch.inference_mode()
    def _tick(self, tick: int, places: Sequence[Place]) -> list[Chunk]:
        check_cancelled(self.cancelled, self.report)
        self.active += [self.begin(place.chunk) for place in places if place.step == 0 and isinstance(place.chunk, int)]
        device = self.active[0].latent.device
        if tick == 0:
            reset_peak(device)
        for chunk in self.active:
            chunk.latent = self.sampling.pinned(chunk.index, chunk.latent)
        steps = [
            Step(chunk.latent, chunk.sigma, place, given=self.sampling.given(chunk.index))
            for chunk, place in zip(self.active, places, strict=True)
        ]
        steps = [step._replace(recompute=again) for step, again in zip(steps, self.decide(steps), strict=True)]
        asked = [step for step in steps if step.recompute or self.forward.holds_residual]
        answers = iter(self.forward.velocities(asked) if asked else [])
        for chunk, step in zip(self.active, steps, strict=True):
            value, recomputed = None, False
            if step.recompute or self.forward.holds_residual:
                value, chunk.branches, recomputed = next(answers)
            chunk.advance(value, recomputed)
            self.report.record(chunk.index, chunk.branches, recomputed)
        self.advanced, finished = self.active, [chunk for chunk in self.active if chunk.finished]
        self.active = [chunk for chunk in self.active if not chunk.finished]
        for chunk in finished:
            whole = self.sampling.pinned(chunk.index, chunk.latent)
            if self.sampling.given(chunk.index):
                chunk.latent = whole  # what is handed out begins with them
            if chunk.clean:
                self.forward.finish(chunk.index, whole)
            self.report.chunks_done += 1
        self.report.history.append((tick, self.forward.history_bytes[0]))
        self.report.device_bytes_peak = max(self.report.device_bytes_peak, peak_bytes(device))
        return [Chunk(chunk.index, chunk.latent) for chunk in finished]

    def begin(self, index: int) -> ActiveChunk:
        """Makes a chunk that starts."""
        sampling, levels = self.sampling, self.sampling.levels(index, self.schedule)
        solver = sampling.solver(levels, lambda step: sampling.noise(index, step))
        start = sampling.start(index)
        return ActiveChunk(index, start, levels, solver, self.order, self.held, self.corrects, self.forecast_weights)

    def decide(self, steps: Sequence[Step]) -> list[bool]:
        """Says for each active chunk whether its step is recomputed."""
        if self.policy.watches:
            self._watch(steps)
            found = [change for chunk in self.active if (change := self.policy.weighed(chunk)) is not None]
            self.weighed = sorted([*self.weighed, *found])[:1]
        wanted = self.policy.decide(self.active)
        last = self.sampling.recompute_last_tick and steps[0].place.tick == self.schedule.ticks - 1
        decided = []
        for number, (chunk, step, again) in enumerate(zip(self.active, steps, wanted, strict=True)):
            mixed_anew = chunk.mixed_anew(self.forward.mix(step, oldest=number == 0))
            decided.append(again or mixed_anew or last)
        return decided

    def _watch(self, steps: Sequence[Step]) -> None:
        """Measures how much each chunk's signal has changed since its last step, with one read-back from the device."""
        signals = self.forward.signals(steps)
        known = [
            (chunk, signal, chunk.signal)
            for chunk, signal in zip(self.active, signals, strict=True)
            if chunk.signal is not None
        ]
        now, before = [signal for _, signal, _ in known], [signal for _, _, signal in known]
        if self.policy.whole_window and known:
            (change,) = relative_change(*([torch.cat([part.flatten() for part in parts])] for parts in (now, before)))
            changes = dict.fromkeys((chunk.index for chunk in self.active), change)
        else:
            changes = dict(zip((chunk.index for chunk, *_ in known), relative_change(now, before), strict=True))
        for chunk, signal in zip(self.active, signals, strict=True):
            chunk.change, chunk.signal = changes.get(chunk.index), signal

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds the time of its block to the report."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds += time.perf_counter() - begun
