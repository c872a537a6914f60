"""Our engine as a sampler of the host, and what Autoregressive Extend does with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import comfy.model_patcher
import comfy.samplers
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from server import PromptServer
from torch import Tensor

from ..flowcache_core.engine import Chunk, Engine, Progress
from ..flowcache_core.errors import UserError
from ..flowcache_core.families import SOLVERS
from ..flowcache_core.history import Clean, HistoryShape
from ..flowcache_core.joint import Given, JointEngine, JointGuidance
from ..flowcache_core.presets import OFF
from ..flowcache_core.report import Report, clock, megabytes, share_of
from ..flowcache_core.rolling import RollingDenoise, RollingEngine, RollingHistory, rolling_bytes
from ..flowcache_core.schedule import CLEAN, END, LEAD, ChunkSchedule, Place
from ..flowcache_core.solvers import chunk_noise
from ..flowcache_core.state import State, make_state
from . import host
from .host_captions import ChunkCaptions
from .host_finished import Finished
from .host_resume import ResumeSettings, run_folder
from .host_video import OutputFile, StreamSettings, VideoOutlet

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
        on_chunk: given each finished chunk in the network's latent space, oldest first, and a function that copies the
            clean history of every branch as it is now.
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
    on_plan: Callable[[Report], None] = lambda report: None
    on_progress: Callable[[Progress, Report, int, int], None] = lambda told, report, used, total: None
    chunks: int = 0
    on_chunk: Callable[[Chunk, Callable[[], Histories]], None] = lambda chunk, save: None
    on_done: Callable[[Report, Histories], None] = lambda report, histories: None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Called by the host with a [B, C, T, H, W] noise; returns the sampled latent of that shape."""
        model = guider.inner_model
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        host.settle_with_others(options)
        patch = host.patch_of(options)
        chunks = self.chunks or host.check_frames(noise, self.chunk_frames)
        if denoise_mask is not None:
            raise UserError(
                "A noise mask was given; FlowCache extends videos instead: give the frames to keep as a prefix."
            )
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, host.KEY, host.diffusion_model, options, is_model_options=True)
        seed = extra_args.get("seed") or 0
        levels = sigmas.tolist()
        shape = (*noise.shape[:2], self.chunk_frames, *noise.shape[3:])
        samples: list[Tensor] = []  # finished chunks, where they are returned
        estimates: dict[int, Tensor] = {}  # clean estimates of chunks that are not finished
        done = self.chunks_before()
        captions = ChunkCaptions(guider.conds)

        def frames(chunk: int) -> slice:
            return slice((chunk - done) * self.chunk_frames, (chunk - done + 1) * self.chunk_frames)

        def guided(x: Tensor, sigma: float) -> Tensor:
            level = torch.full((x.shape[0],), sigma, device=x.device, dtype=torch.float32)
            return guider(x, level, model_options=options, seed=seed)

        def start(chunk: int) -> Tensor:
            if self.chunks:
                return fresh(chunk, CLEAN) * levels[0]
            x = noise[:, :, frames(chunk)] * levels[0]
            return x if latent_image is None else x + (1 - levels[0]) * latent_image[:, :, frames(chunk)]

        def fresh(chunk: int, step: int) -> Tensor:
            return chunk_noise(seed, chunk, shape, step).to(noise)

        def progress(told: Progress) -> None:
            used = sum(history.bytes_used for history in histories.values())
            self.on_progress(told, report, used, sum(history.bytes for history in histories.values()))
            if callback:
                # SamplerCustomAdvanced takes its clean estimate of the whole video from the last call.
                before = samples if told.tick == told.ticks else []
                shown = torch.cat([*before, *estimates.values()], dim=2) if estimates else torch.zeros_like(noise)
                callback(told.tick - 1, shown, shown, told.ticks)

        sides = [side for side in guider.conds if side != "negative" or getattr(guider, "cfg", None) != 1.0]
        branches = sum(len(guider.conds[side] or []) for side in sides)
        prefix, end = (None if x is None else model.process_latent_in(x.to(noise)) for x in (self.prefix, self.end))
        schedule = self.schedule(chunks, len(levels) - 1)
        common = {"noise": fresh, "solver": SOLVERS[self.solver], "on_progress": progress}
        if self.kind == "causal":
            settings = patch.settings if patch else OFF
            lead, after = self.frames_before() % self.chunk_frames, 0 if end is None else end.shape[2]
            run = host.Run(model, settings, schedule, self.chunk_frames, options["transformer_options"], lead, after)
            if self.state:
                run.runner.load(self.state.by_branch)

            def denoise(x: Tensor, sigma: float, place: Place) -> Tensor:
                run.place, run.sigma = place, sigma
                said = {LEAD: 0, END: schedule.total_chunks - 1}.get(place.chunk, place.chunk)
                guider.conds, run.caption = captions.of(said)
                clean = guided(x, sigma)
                if place.step == CLEAN:
                    return torch.zeros_like(x)
                estimates[place.chunk] = clean
                return (x - clean) / sigma

            first = self.first_levels if schedule.first_steps else None
            engine = Engine(run.runner, denoise, levels, start, first_sigmas=first, **common)
            report, histories = run.runner.report, run.runner.histories
            run.runner.plan_history(torch.empty(shape, device="meta"), branches)
        else:
            captions.refuse(f"attention '{self.kind}'")
            run = JointRun(model, options["transformer_options"], self.kind, self.chunk_frames)
            engine = self._joint_engine(schedule, Window(run, guided), levels, start, prefix, end, seed, common)
            report, histories = engine.report, {}
            if self.kind == "rolling":
                a_branch = rolling_bytes(run.history_shape(shape, chunks), run.dtype.itemsize)
                report.history_bytes_planned = branches * a_branch
        self.on_plan(report)
        options["transformer_options"][host.RUN] = run
        if self.kind == "causal" and prefix is not None:
            engine.prefill(prefix, self.condition)
        if self.kind == "causal" and end is not None:
            engine.prefill_end(end)
        save = run.runner.save if self.kind == "causal" and end is None else dict
        for chunk in engine.run():
            host.check_finite(chunk.latent, f"chunk {chunk.index}")
            estimates.pop(chunk.index, None)
            if self.chunks:
                samples.clear()
            samples.append(chunk.latent)
            self.on_chunk(chunk, save)
        report.settings = patch.label if patch else "FlowCache off"
        result = torch.cat(samples, dim=2)
        if patch and not self.chunks:
            patch.remember(model.process_latent_out(result.to(torch.float32)), report)
        self.on_done(report, save())
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

    def _joint_engine(self, schedule, window, levels, start, prefix, end, seed, common) -> JointEngine:
        if self.state is not None:
            raise UserError(
                f"A run with attention '{self.kind}' keeps no history to go on from; connect a prefix instead."
            )
        if self.kind == "rolling":
            if prefix is not None or end is not None:
                raise UserError("Rolling Forcing takes no given frames; leave prefix and end unconnected.")
            return RollingEngine(schedule, window, levels, start, **common)
        condition = self.condition if prefix is not None else 0.0

        def grain(tick: int) -> Tensor:
            return chunk_noise(seed, -1, prefix.shape, tick).to(prefix)

        return JointEngine(schedule, window, levels, start, given=Given(prefix, end, condition, grain), **common)


class JointRun(host.HostRun):
    """A run whose chunks go through the network together. Each branch has what denoises it, history included."""

    def __init__(self, model, options: dict, kind: Kind, chunk_frames: int):
        super().__init__(model, options)
        self.kind, self.chunk_frames = kind, chunk_frames
        self.levels: Tensor | None = None  # noise level of each frame; None stores a finished chunk
        self.first = 0
        self.dtype = host.compute_dtype(model)
        self._denoise: dict[str, JointGuidance | RollingDenoise] = {}

    def forward(self, network: torch.nn.Module, x: Tensor, context: Tensor, options: dict) -> Tensor:
        """Stands in for the network's own forward, branch after branch. x [rows, C, T, H, W]."""
        names = self.names(options)
        rows = x.shape[0] // len(names)
        parts = []
        for name, part, text in zip(names, x.split(rows), context.split(rows), strict=True):
            if name not in self._denoise:
                self._denoise[name] = self._make(text)
            if self.levels is None:
                self._denoise[name].clean(part, self.first)
                parts.append(torch.zeros_like(part))
            else:
                parts.append(self._denoise[name](part, self.levels, self.first))
        return torch.cat(parts)

    def history_shape(self, chunk: Sequence[int], chunks: int) -> HistoryShape:
        """Sizes of a branch's history of so many chunks of shape [B, C, T, H, W]."""
        backbone, (batch, _, frames, *size) = self.backbone, chunk
        grid = backbone.grid(*size)
        return HistoryShape(backbone.layers, batch, backbone.heads, backbone.head_dim, grid, frames, chunks)

    def _make(self, text: Tensor) -> JointGuidance | RollingDenoise:
        if self.kind == "rolling":
            return RollingDenoise(self.backbone, text, RollingHistory(self.chunk_frames), self.attention)
        return JointGuidance(self.backbone, {"": text}, {"": 1.0}, self.attention)


@dataclass
class Window:
    """What a joint engine calls: the guider, at noise level 1 for all, where a clean estimate is x minus the velocity.

    The frames' own levels go beside it, since the host knows one level a call.
    """

    run: JointRun
    guided: Callable[[Tensor, float], Tensor]

    def __call__(self, x: Tensor, levels: Tensor, first: int) -> Tensor:
        self.run.levels, self.run.first = levels, first
        return x - self.guided(x, 1.0)

    def clean(self, x: Tensor, first: int) -> None:
        self.run.levels, self.run.first = None, first
        self.guided(x, 1.0)


@dataclass(frozen=True)
class Extended:
    """What Autoregressive Extend gives: all frames in the host's latent space, a state, a report, its video if any."""

    latent: Tensor
    state: State
    report: Report
    video: OutputFile | None


def extend(
    model: comfy.model_patcher.ModelPatcher,
    positive,
    negative,
    scale: float,
    seed: int,
    levels: list[float],
    first_levels: list[float] | None,
    chunks: int,
    chunk_frames: int,
    lag: int,
    solver: str,
    size: tuple[int, int],
    kind: Kind,
    prefix: Tensor | None,
    end: Tensor | None,
    condition: float,
    state: State | None,
    stream: StreamSettings | None,
    resume: ResumeSettings | None,
    metadata: dict,
    node_id: str | None,
) -> Extended:
    """Runs the host's guider over `chunks` new chunks.

    Args:
        scale: of classifier-free guidance.
        levels: noise levels, [steps + 1].
        first_levels: of the first chunk where it takes more steps.
        size: width and height in pixels, where neither prefix nor state gives one.
        kind: how chunks see each other, see `ARSampler`.
        prefix, end: latents [B, C, T, H, W] in the host's space that come before and after, or None.
        condition: noise level that the prefix is shown at.
        state: to go on from, or None.
        stream: how the video is written while the run goes on, or None.
        resume: that finished chunks are kept on disk and taken from there, or None.
        metadata: of the workflow, for the video.
        node_id: of the node that shows the progress, or None.
    """
    if host.patch_of(model.model_options) is None:
        model = host.patched(model, OFF, "FlowCache off")
    channels = model.get_model_object("latent_format").latent_channels
    shape = [1, channels, chunk_frames, size[1] // 8, size[0] // 8]
    sizes = []
    for given in (prefix, end, None if state is None else state.latents):
        if given is not None:
            host.check_latent(given, channels)
            shape = [*given.shape[:2], chunk_frames, *given.shape[3:]]
            sizes.append((8 * given.shape[4], 8 * given.shape[3]))
    if len(set(sizes)) > 1:
        raise UserError(f"The given frames are of sizes {sizes} (width, height); bring them to one size.")
    if state is not None:
        state.check(host.model_name(model), chunk_frames, shape)
        if not state.histories:
            raise UserError(
                "The state is of a run that keeps no history (joint or rolling attention, or a given end); connect "
                "that run's latent as a prefix instead."
            )
    channel = model.model.process_latent_in
    before = state.latents if state is not None else None if prefix is None else channel(prefix.cpu().float())
    kept = {}
    begun = time.perf_counter()

    def on_progress(told: Progress, report: Report, used: int, total: int) -> None:
        finished.tick, finished.ticks = told.tick, told.ticks
        progress_text(describe(told, report, used, total, begun, len(finished.earlier)), node_id)

    sampler = ARSampler(
        chunk_frames,
        lag,
        solver,
        kind,
        first_levels,
        prefix,
        end,
        condition,
        state,
        on_plan=lambda report: progress_text(describe_plan(report), node_id),
        on_progress=on_progress,
        on_chunk=lambda chunk, save: finished.add(chunk, save),
        on_done=lambda report, histories: kept.update(report=report, histories=histories),
    )
    first, lead = sampler.chunks_before(), sampler.frames_before() % chunk_frames
    folder = earlier = None
    if resume is not None:
        if kind != "causal" or lag == 0 or end is not None:
            raise UserError(
                "A run can be resumed where chunks follow one another and nothing is given after them; use attention "
                "'causal', a lag above 0 and no end, or disconnect 'resume'."
            )
        before_run = (prefix, state and (state.latents, state.histories))
        run = (positive, negative, scale, seed, levels, first_levels, chunks, lag, solver, shape, condition, before_run)
        folder = run_folder(resume, model, first, chunk_frames, lead, *run)
        earlier = folder.load()
    outlet = None if stream is None else VideoOutlet(stream, model, shape, metadata)
    finished = Finished(folder, outlet, stream is None or stream.keep_latents)
    try:
        ready = range(first, earlier.chunks if earlier else first)
        finished.begin(before, ready, lambda line: progress_text(line, node_id))
        report = Report(sampler.schedule(chunks, len(levels) - 1), host.patch_of(model.model_options).label)
        histories = earlier.by_branch if earlier else {}
        sampler.chunks = chunks - finished.count
        if earlier is not None:
            sampler.state, sampler.prefix = earlier, None
        if sampler.chunks:
            _sample(model, positive, negative, scale, seed, levels, sampler, shape)
            report, histories = kept["report"], kept["histories"]
        report.notes += finished.notes
        after = None if end is None else channel(end.cpu().float())
        video = None
        if outlet is not None:
            if after is not None:
                outlet.add(after)
            video = outlet.finish(report)
    finally:
        if outlet is not None:
            outlet.close()
    latents = torch.cat([*finished.latents, *([] if after is None else [after])], dim=2)
    dropped = (state.dropped if state else 0) if finished.keep else lead + (first + chunks - 1) * chunk_frames
    made = make_state(latents, histories, chunk_frames, host.model_name(model), dropped)
    shown = model.model.process_latent_out(latents.float())
    host.patch_of(model.model_options).remember(shown, report)
    return Extended(shown, made, report, video)


def _sample(model, positive, negative, scale: float, seed: int, levels: list[float], sampler: ARSampler, shape) -> None:
    """Runs the host's guider; the sampler draws each chunk's noise [B, C, T, H, W] itself."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    noise = torch.zeros(shape)
    callback = latent_preview.prepare_callback(model, sampler.schedule(sampler.chunks, len(levels) - 1).ticks)
    sigmas = torch.tensor(levels, dtype=torch.float32)
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)


def progress_text(text: str, node_id: str | None) -> None:
    """Shows a line on the node that is running."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def describe_plan(report: Report) -> str:
    """What is known before a run; stays on the node until its first tick is done."""
    planned, unbounded = report.history_bytes_planned, report.history_bytes_unbounded
    more = f", {megabytes(unbounded)} unbounded" if unbounded > planned else ""
    return f"history: {megabytes(planned)} planned{more}"


def describe(told: Progress, report: Report, used: int, total: int, begun: float, earlier: int = 0) -> str:
    """Lines on how a run goes; they fit a node's width.

    Args:
        used, total: bytes of history.
        begun: when, by the clock of `perf_counter`.
        earlier: chunks that an interrupted run left.
    """
    chunks, chunk = report.schedule.chunks, min(report.chunks_done + 1, report.schedule.chunks)
    spent = time.perf_counter() - begun
    whole = spent * told.ticks / told.tick  # seconds that the run will take
    lines = [
        f"chunk {earlier + chunk} of {earlier + chunks}, {whole / chunks:.1f} s a chunk, {clock(whole - spent)} left",
        f"{report.reused:.0%} reused" + (f", history {share_of(used, total)}" if total else ""),
    ]
    return "\n".join([*lines, *report.notes])
