"""The loop: tick by tick, every active chunk one step further, oldest first; finished chunks are handed out."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..history.cache import Clean, Grown
from ..report import Report
from ..reuse.policies import Corrector
from ..schedule import CLEAN, END, LEAD, ChunkSchedule, Place
from ..solvers.one_step import Euler, Linear, Solver, SolverFactory, no_noise
from ..solvers.weights import joined, weighted
from .runner import Runner, Step, Text

Denoise = Callable[[Sequence[Step]], Iterator[Tensor]]  # a tick's steps, oldest chunk first -> their guided velocities


class Cancelled(Exception):
    """The run was cancelled by its caller."""


class Chunk(NamedTuple):
    """A finished chunk.

    Attributes:
        index: its number in the video; prefix chunks count.
        latent: [B, C, T, H, W].
    """

    index: int  # type: ignore[assignment]  # hides a tuple's own index()
    latent: Tensor


@dataclass(frozen=True)
class Progress:
    """Told after every tick: ticks done and in all, the chunks that took a step, and clean chunks' number."""

    tick: int
    ticks: int
    places: Sequence[Place]
    clean: int


def turns(
    schedule: ChunkSchedule,
    report: Report,
    take: Callable[[int, Sequence[Place]], list[Chunk]],
    on_progress: Callable[[Progress], None],
) -> Iterator[Chunk]:
    """The loop of every engine: tick by tick, timed and told.

    Args:
        take: one tick, by its number and its places; gives the chunks that are finished by it.
    """
    for tick, places in enumerate(schedule):
        begun = time.perf_counter()
        finished = take(tick, places)
        report.seconds += time.perf_counter() - begun
        on_progress(Progress(tick + 1, schedule.ticks, places, schedule.prefix + report.chunks_done))
        yield from finished


def check(cancelled: Callable[[], bool], report: Report) -> None:
    """Raises Cancelled where the caller wants the run to end."""
    if cancelled():
        raise Cancelled(f"Cancelled after {report.chunks_done} of {report.schedule.chunks} chunks.")


@dataclass
class Guidance:
    """Velocity from any number of branches: a weighted sum, classifier-free guidance being {cond: s, uncond: 1 - s}.

    Attributes:
        runner: runs the branches, all in one batch.
        texts: for each branch a text embedding [B, tokens, width], or one for each chunk by its index.
        weights: for each branch its weight, or a function of the noise level that gives them.
    """

    runner: Runner
    texts: Mapping[Hashable, Tensor | Callable[[int], Tensor]]
    weights: Mapping[Hashable, float] | Callable[[float], Mapping[Hashable, float]]
    _words: dict[int, Text] = field(default_factory=dict)  # of the newest chunks

    def __call__(self, steps: Sequence[Step]) -> Iterator[Tensor]:
        names = list(self.texts)
        asked = [step._replace(x=torch.cat([step.x] * len(names))) for step in steps] if len(names) > 1 else steps
        texts = [self._of(step.place.chunk) for step in steps]
        for step, velocities in zip(steps, self.runner.forward(asked, names, texts), strict=True):
            weights = self.weights(step.sigma) if callable(self.weights) else self.weights
            if len(names) == 1 and weights[names[0]] == 1:
                yield velocities
            else:
                yield weighted(velocities.chunk(len(names)), [weights[name] for name in names])

    def _of(self, chunk: int) -> Text:
        """All branches' texts of a chunk, branch after branch, and the tensors that they came from as their name."""
        if chunk not in self._words:
            if len(self._words) > self.runner.schedule.max_active:
                self._words.pop(min(self._words))
            key = tuple(text(chunk) if callable(text) else text for text in self.texts.values())
            self._words[chunk] = Text(joined(list(key)), key)
        return self._words[chunk]


def guidance(runner: Runner, positive, negative=None, scale: float = 1.0) -> Guidance:
    """Classifier-free guidance; at scale 1 only the conditional branch is run."""
    if negative is None or scale == 1.0:
        return Guidance(runner, {"cond": positive}, {"cond": 1.0})
    return Guidance(runner, {"cond": positive, "uncond": negative}, {"cond": scale, "uncond": 1.0 - scale})


@dataclass
class Active:
    """What an active chunk [B, C, T, H, W] has got to, and what takes it further."""

    latent: Tensor
    solver: Solver
    corrector: Corrector


class Engine:
    """One run: a generator of finished chunks.

    Args:
        runner: holds schedule, history and reuse of this run.
        denoise: guided velocity of a chunk, `Guidance` or the host's guider.
        sigmas: noise levels of a chunk's steps, [steps + 1], falling to 0.
        start: gives a chunk's latent [B, C, T, H, W] at the first noise level, from its index.
        noise: fresh unit noise for a chunk and step, for solvers that add some.
        solver: makes a chunk's solver.
        first_sigmas: noise levels of the first generated chunk where it takes more steps.
        on_progress: called after every tick.
        cancelled: asked before every forward; True ends the run with `Cancelled`.
    """

    def __init__(
        self,
        runner: Runner,
        denoise: Denoise,
        sigmas: Sequence[float],
        start: Callable[[int], Tensor],
        noise: Callable[[int, int], Tensor] = no_noise,
        solver: SolverFactory = Euler,
        first_sigmas: Sequence[float] | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self.runner = runner
        self.schedule = runner.schedule
        self.denoise = denoise
        self.sigmas = list(sigmas)
        self.first_sigmas = list(first_sigmas or sigmas)
        self.start = start
        self.noise = noise
        self.solver = solver
        if getattr(solver, "adds_noise", False):
            runner.hold_clean()
        self.on_progress = on_progress
        self.cancelled = cancelled
        self._active: dict[int, Active] = {}
        self._finished: list[Step] = []  # chunks whose clean keys and values go along with the next tick's
        for chunk in {self.schedule.indices[0], self.schedule.indices[-1]}:
            steps, levels = self.schedule.steps_of(chunk), self._sigmas(chunk)
            if len(levels) != steps + 1:
                raise ValueError(
                    f"Chunk {chunk} takes {steps} steps and needs {steps + 1} noise levels, got {len(levels)}."
                )

    @torch.inference_mode()
    def prefill(self, latent: Tensor, condition: float = 0.0) -> None:
        """Runs given frames, so that generated chunks attend to them.

        Args:
            latent: [B, C, lead + prefix chunks * T, H, W]; the runner knows how many frames the lead has.
            condition: noise level that they are shown at, with noise of step CLEAN mixed in (SkyReels-V2's
                addnoise_condition, 0.02 for 20).
        """
        lead = self.runner.given.lead
        if lead:
            self._show(LEAD, latent[:, :, :lead], condition)
        for index in range(self.schedule.prefix):
            first = lead + index * self.runner.chunk_frames
            self._show(index, latent[:, :, first : first + self.runner.chunk_frames], condition)

    @torch.inference_mode()
    def prefill_end(self, latent: Tensor) -> None:
        """Runs frames [B, C, T, H, W] that come after the last chunk, at their place in time; all chunks attend to
        them.

        Call it after `prefill`: an end attends to everything that is given.
        """
        self._show(END, latent, 0.0)

    def _show(self, index: int, latent: Tensor, condition: float) -> None:
        begun = time.perf_counter()
        check(self.cancelled, self.runner.report)
        if condition:
            latent = torch.lerp(latent, self.noise(index, CLEAN)[:, :, : latent.shape[2]], condition)
        self._store(Step(latent, condition, Place(index, CLEAN, 0)))
        self.runner.report.seconds += time.perf_counter() - begun

    def run(self) -> Iterator[Chunk]:
        """Generates the schedule's chunks, oldest first."""
        return turns(self.schedule, self.runner.report, self._tick, self.on_progress)

    def save(self) -> dict[Hashable, Clean]:
        """The clean history of every branch, on the CPU, with all chunks that were handed out."""
        self._settle()
        return self.runner.save()

    def save_new(self, anew: bool) -> Callable[[], Grown]:
        """Begins to copy what that history has grown by since the last call or since it was loaded; `anew`: all of it.
        Call what it gives for the copies."""
        self._settle()
        return self.runner.save_new(anew)

    @torch.inference_mode()
    def _settle(self) -> None:
        begun = time.perf_counter()
        self._store_finished()
        self.runner.report.seconds += time.perf_counter() - begun

    def _store_finished(self) -> None:
        for step in self._finished:
            self._store(step)
        self._finished.clear()

    def _store(self, step: Step) -> None:
        """The pass that stores keys and values of frames that are not denoised any further."""
        deque(self.denoise([step]), maxlen=0)
        self.runner.commit(step.place.chunk)

    @torch.inference_mode()
    def _tick(self, tick: int, places: Sequence[Place]) -> list[Chunk]:
        active = self._active
        for place in places:
            if place.step == 0:
                solver = self.solver(self._sigmas(place.chunk), self._noise_of(place.chunk))
                active[place.chunk] = Active(self.start(place.chunk), solver, Corrector(self.runner.order))
        steps = [Step(active[place.chunk].latent, self._sigmas(place.chunk)[place.step], place) for place in places]
        self.runner.plan(steps)
        stored, self._finished = self._finished, []
        check(self.cancelled, self.runner.report)
        for step, velocity in zip([*stored, *steps], self.denoise([*stored, *steps]), strict=True):
            if step.place.step != CLEAN:
                self._move(active[step.place.chunk], velocity, step.place)
            check(self.cancelled, self.runner.report)
        # After all steps of the tick: active chunks' slots lie behind one another.
        for step in stored:
            self.runner.commit(step.place.chunk)
        chunks = [self._finish(place) for place in places if place.step == self.schedule.steps_of(place.chunk) - 1]
        if not active or self.runner.settings.history.budget is not None:
            self._store_finished()  # nothing goes along with them next, or the history may be cut before that
        self.runner.report.history.append((tick, self.runner.history_bytes_used))
        return chunks

    def _finish(self, place: Place) -> Chunk:
        latent = self._active.pop(place.chunk).latent
        if self.runner.settings.clean_pass:
            self._finished.append(Step(latent, 0.0, Place(place.chunk, CLEAN, place.tick)))
        else:
            self.runner.commit(place.chunk)
        self.runner.report.chunks_done += 1
        return Chunk(place.chunk, latent)

    def _move(self, chunk: Active, velocity: Tensor, place: Place) -> None:
        recomputed, solver = self.runner.recomputed[place.chunk], chunk.solver
        if not (self.runner.corrects and isinstance(solver, Linear)):
            chunk.latent = solver.step(chunk.latent, velocity, place.step)
            return
        if recomputed:
            chunk.latent = chunk.corrector.step(chunk.latent, solver, velocity, place.step)
        chunk.latent = solver.step(chunk.latent, velocity, place.step, coasting=not recomputed)

    def _sigmas(self, chunk: int) -> list[float]:
        return self.first_sigmas if chunk == self.schedule.prefix else self.sigmas

    def _noise_of(self, chunk: int) -> Callable[[int], Tensor]:
        return lambda step: self.noise(chunk, step)
