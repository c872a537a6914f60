"""Our engine as a sampler of the host."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...flowcache_core.engine.joint import Given, JointEngine
from ...flowcache_core.engine.loop import Chunk, Engine, Progress
from ...flowcache_core.engine.rolling import RollingEngine, rolling_bytes
from ...flowcache_core.engine.runner import Step
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.snapshot import Clean, Grown
from ...flowcache_core.models.families import SOLVERS
from ...flowcache_core.models.presets import OFF
from ...flowcache_core.report import Report
from ...flowcache_core.schedule import CLEAN, END, LEAD, ChunkSchedule
from ...flowcache_core.solvers.noise_levels import row_levels
from ...flowcache_core.solvers.one_step import chunk_noise
from ...flowcache_core.storage.state import State
from . import patch as host
from .captions import ChunkCaptions, Conditions
from .checks import check_finite, check_frames, settle_with_others
from .joint import JointRun, Window
from .shortcut import Shortcut, same_sum

Histories = dict[str, Clean]
Kind = Literal["causal", "joint", "rolling"]  # how chunks see each other


@dataclass
class ARSampler(host.ChunkSampler):
    """Our engine as a host's sampler: through the guider that it is given, so that guidance is the host's.

    Attributes:
        chunk_frames: latent frames of a chunk.
        lag: ticks between the starts of two chunks; the number of steps, or more, is one chunk at a time.
        solver: a key of `SOLVERS`.
        kind: "causal" goes chunk by chunk over a history; "joint" runs all chunks of a window together, "rolling" the
            active ones, seeing each other both ways (SkyReels-V2 and Rolling Forcing as upstream runs them).
        first_levels: noise levels of the first chunk where it takes more steps than the others; for "causal".
        prefix: latent [B, C, T, H, W] in the host's space that comes before the generated frames.
        end: such a latent that comes after them; not for "rolling".
        condition: noise level that the prefix is shown at.
        state: an earlier run's state to go on from; for "causal".
        chunks: how many to generate from a noise of a single chunk, each with its own noise of the run's seed; what is
            returned is then the last one. 0: as many as the noise holds, all of which are returned.
        on_plan: told before the run, with the report that knows how large the history will be.
        on_progress: told after every tick, with the report and the bytes of history in use and in all.
        on_chunk: given each finished chunk in the network's latent space, oldest first, and a function that begins to
            copy what the clean history has grown by since it was last called, or all of it.
        on_done: given the report and what the run keeps, at the end.
    """

    chunk_frames: int
    lag: int
    solver: str
    kind: Kind = "causal"
    first_levels: list[float] | None = None
    prefix: Tensor | None = None
    end: Tensor | None = None
    condition: float = 0.0
    state: State | None = None
    chunks: int = 0
    on_plan: Callable[[Report], None] = lambda report: None
    on_progress: Callable[[Progress, Report, int, int], None] = lambda told, report, used, total: None
    on_chunk: Callable[[Chunk, Callable[[bool], Callable[[], Grown]]], None] = lambda chunk, save_new: None
    on_done: Callable[[Report, Histories], None] = lambda report, histories: None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Called by the host with a [B, C, T, H, W] noise; returns the sampled latent of that shape."""
        if denoise_mask is not None:
            raise UserError(
                "A noise mask was given; FlowCache extends videos instead: give the frames to keep as a prefix."
            )
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        notes = settle_with_others(options)
        patch = host.patch_of(options)
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, host.KEY, host.diffusion_model, options, is_model_options=True)
        seed = extra_args.get("seed") or 0
        call = Call(self, guider, options, sigmas.tolist(), seed, noise, latent_image, callback)
        course = call.causal() if self.kind == "causal" else call.joint()
        course.report.notes += notes
        for chunk in course.engine.run():
            check_finite(chunk.latent, f"chunk {chunk.index}")
            call.finish(chunk)
            self.on_chunk(chunk, course.save_new)
        course.report.settings = patch.label if patch else "FlowCache off"
        result = torch.cat(call.samples, dim=2)
        if patch and not self.chunks:
            patch.remember(guider.inner_model.process_latent_out(result.to(torch.float32)), course.report)
        self.on_done(course.report, course.save())
        return result

    def schedule(self, chunks: int, steps: int) -> ChunkSchedule:
        """Of a run of so many new chunks. Only a video's very first chunk takes more steps."""
        done = self.chunks_before()
        first = None if done or self.first_levels is None else len(self.first_levels) - 1
        return ChunkSchedule(chunks, steps, min(self.lag, steps), done, first)

    def frames(self, noise: Tensor) -> int:
        """Latent frames of the whole video, as far as the history may hold them."""
        return max(noise.shape[2], (self.chunks_before() + self.chunks) * self.chunk_frames)

    def chunks_before(self) -> int:
        """Whole chunks that a causal run has behind it when it starts."""
        return self.frames_before() // self.chunk_frames if self.kind == "causal" else 0

    def frames_before(self) -> int:
        """Frames that are there already."""
        if self.state is not None:
            return self.state.frames
        return 0 if self.prefix is None else self.prefix.shape[2]


@dataclass(frozen=True)
class Course:
    """A run that is ready to go.

    Attributes:
        engine, report: of the run.
        save, save_new: copy the clean history of every branch, and what it has grown by since the last call; nothing
            where none is kept.
    """

    engine: Engine | JointEngine
    report: Report
    save: Callable[[], Histories] = dict
    save_new: Callable[[bool], Callable[[], Grown]] = lambda anew: partial(Grown, {}, True)


@dataclass
class Call:
    """One call of an `ARSampler` by the host: the engine's questions, put to the guider.

    Attributes:
        sampler: that is called.
        guider, noise, latent_image, callback: the host's, see `ARSampler.sample`.
        options: the model options of this run.
        levels: noise levels, [steps + 1].
        seed: of the run.
        samples: finished chunks, where they are returned.
        estimates: clean estimates of chunks that are not finished.
    """

    sampler: ARSampler
    guider: object
    options: dict
    levels: list[float]
    seed: int
    noise: Tensor
    latent_image: Tensor | None
    callback: Callable | None
    samples: list[Tensor] = field(default_factory=list)
    estimates: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        sampler, noise = self.sampler, self.noise
        chunks = sampler.chunks or check_frames(noise, sampler.chunk_frames)
        self.model = self.guider.inner_model
        self.shape = (*noise.shape[:2], sampler.chunk_frames, *noise.shape[3:])
        self.schedule = sampler.schedule(chunks, len(self.levels) - 1)
        self.captions = ChunkCaptions(self.guider.conds)

    def causal(self) -> Course:
        """Chunk by chunk over a history; frames that are given have been run when it returns."""
        sampler, patch = self.sampler, host.patch_of(self.options)
        prefix, end = self._inside(sampler.prefix), self._inside(sampler.end)
        lead, after = sampler.frames_before() % sampler.chunk_frames, 0 if end is None else end.shape[2]
        settings, transformer_options = patch.settings if patch else OFF, self.options["transformer_options"]
        run = host.Run(self.model, settings, self.schedule, sampler.chunk_frames, transformer_options, lead, after)
        runner = run.runner
        if sampler.state:
            runner.load(sampler.state.by_branch)
        plain_sum = same_sum(self.guider, self.options, host.KEY)
        engine = Engine(
            runner,
            partial(self._denoise, run, Shortcut(runner, plain_sum), plain_sum),
            self.levels,
            self._start,
            self._fresh,
            SOLVERS[sampler.solver],
            sampler.first_levels if self.schedule.first_steps else None,
            lambda told: self._progress(told, runner.report, runner.histories),
        )
        runner.plan_history(torch.empty(self.shape, device="meta"), self._branches())
        sampler.on_plan(runner.report)
        transformer_options[host.RUN] = run
        if prefix is not None:
            engine.prefill(prefix, sampler.condition)
        if end is not None:
            engine.prefill_end(end)
        if end is not None:
            return Course(engine, runner.report)
        return Course(engine, runner.report, engine.save, engine.save_new)

    def joint(self) -> Course:
        """All chunks of a window, or all active ones, in one forward."""
        sampler, kind = self.sampler, self.sampler.kind
        self.captions.refuse(f"attention '{kind}'")
        if sampler.state is not None:
            raise UserError(f"A run with attention '{kind}' keeps no history to go on from; connect a prefix instead.")
        prefix, end = self._inside(sampler.prefix), self._inside(sampler.end)
        if kind == "rolling" and (prefix is not None or end is not None):
            raise UserError("Rolling Forcing takes no given frames; leave prefix and end unconnected.")
        run = JointRun(self.model, self.options["transformer_options"], kind, sampler.chunk_frames)

        def grain(tick: int) -> Tensor:
            return chunk_noise(self.seed, -1, prefix.shape, tick).to(prefix)

        condition = sampler.condition if prefix is not None else 0.0
        engine = (RollingEngine if kind == "rolling" else JointEngine)(
            self.schedule,
            Window(run, self._guided),
            self.levels,
            self._start,
            self._fresh,
            SOLVERS[sampler.solver],
            Given(prefix, end, condition, grain),
            lambda told: self._progress(told, engine.report, {}),
        )
        if kind == "rolling":
            a_branch = rolling_bytes(run.history_shape(self.shape, self.schedule.chunks), run.dtype.itemsize)
            engine.report.history_bytes_planned = self._branches() * a_branch
        sampler.on_plan(engine.report)
        self.options["transformer_options"][host.RUN] = run
        return Course(engine, engine.report)

    def finish(self, chunk: Chunk) -> None:
        self.estimates.pop(chunk.index, None)
        if self.sampler.chunks:
            self.samples.clear()
        self.samples.append(chunk.latent)

    def _inside(self, given: Tensor | None) -> Tensor | None:
        """Given frames in the network's latent space."""
        return None if given is None else self.model.process_latent_in(given.to(self.noise))

    def _branches(self) -> int:
        """Branches of guidance that the guider will ask for."""
        conds, scale = self.guider.conds, getattr(self.guider, "cfg", None)
        return sum(len(conds[side] or []) for side in conds if side != "negative" or scale != 1.0)

    def _guided(self, x: Tensor, sigma: float) -> Tensor:
        """The guider's clean estimate at one noise level."""
        return self.guider(x, row_levels(sigma, x), model_options=self.options, seed=self.seed)

    def _denoise(self, run: host.Run, shortcut: Shortcut, together: bool, steps: Sequence[Step]) -> Iterator[Tensor]:
        """Velocities of a tick's steps; `together`: the guider may be asked for several chunks at once."""
        cleans = shortcut(steps, lambda asked: self._asked(run, together, asked))
        for (x, sigma, place), clean in zip(steps, cleans, strict=True):
            if place.step == CLEAN:
                yield torch.zeros_like(x)
            else:
                self.estimates[place.chunk] = clean
                yield (x - clean) / sigma

    def _asked(self, run: host.Run, together: bool, steps: Sequence[Step]) -> Iterator[Tensor]:
        """The guider's clean estimates, of neighbours with the same captions at once."""

        def caption(step: Step) -> int:
            return self._conditions(step)[1]

        groups = [list(group) for _, group in groupby(steps, caption)] if together else [[step] for step in steps]
        for run.steps in groups:
            self.guider.conds, run.caption = self._conditions(run.steps[0])
            if len(run.steps) == 1:
                yield self._guided(run.steps[0].x, run.steps[0].sigma)
            else:
                yield from self._guided_at_once(run.steps)

    def _guided_at_once(self, steps: Sequence[Step]) -> Iterator[Tensor]:
        """Chunks with noise levels of their own, behind one another. The guider is told level 1, at which the clean
        estimate is x minus the velocity."""
        x = torch.cat([step.x for step in steps], dim=2)
        velocities = (x - self._guided(x, 1.0)).chunk(len(steps), dim=2)
        return (step.x - step.sigma * velocity for step, velocity in zip(steps, velocities, strict=True))

    def _conditions(self, step: Step) -> tuple[Conditions, int]:
        chunk = step.place.chunk
        return self.captions.of({LEAD: 0, END: self.schedule.total_chunks - 1}.get(chunk, chunk))

    def _start(self, chunk: int) -> Tensor:
        """A chunk at the first noise level."""
        if self.sampler.chunks:
            return self._fresh(chunk, CLEAN) * self.levels[0]
        first = (chunk - self.schedule.prefix) * self.sampler.chunk_frames
        frames = slice(first, first + self.sampler.chunk_frames)
        x = self.noise[:, :, frames] * self.levels[0]
        return x if self.latent_image is None else x + (1 - self.levels[0]) * self.latent_image[:, :, frames]

    def _fresh(self, chunk: int, step: int) -> Tensor:
        return chunk_noise(self.seed, chunk, self.shape, step).to(self.noise)

    def _progress(self, told: Progress, report: Report, histories: dict) -> None:
        used, total = (sum(getattr(each, name) for each in histories.values()) for name in ("bytes_used", "bytes"))
        self.sampler.on_progress(told, report, used, total)
        if self.callback:
            # SamplerCustomAdvanced takes its clean estimate of the whole video from the last call.
            before = self.samples if told.tick == told.ticks else []
            estimates = list(self.estimates.values())
            shown = torch.cat([*before, *estimates], dim=2) if estimates else torch.zeros_like(self.noise)
            self.callback(told.tick - 1, shown, shown, told.ticks)
