"""What Autoregressive Extend does: more chunks behind what is there, whatever the model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.samplers
import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...flowcache_core.engine.anew import latents_needed
from ...flowcache_core.engine.build import IN_ORDER, Seeing
from ...flowcache_core.engine.from_video import STRENGTH, FromVideo, from_video
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.streams import SideStream
from ...flowcache_core.models.families import FAMILIES
from ...flowcache_core.models.latent_spaces import pixel_size, stride_of
from ...flowcache_core.report import Report
from ...flowcache_core.schedule import ChunkSchedule
from ...flowcache_core.storage import partial_videos
from ...flowcache_core.storage.run_folder import RunFolder
from ...flowcache_core.storage.state import State, make_state
from . import patch as host
from .checks import check_latent, check_network, check_size
from .digest import digest
from .finished import FinishedChunks
from .held import HELD
from .live import RUNS, LiveRun, live_run
from .live_prompt import LivePrompt, determining_prompt, live_prompt
from .previews import preview_callback
from .progress import progress_text
from .resume import ResumeSettings, patches_of, root, weights_of
from .sampler import ARSampler
from .stream import FramesOutlet, Outlet, OutputFile, StreamSettings, VideoOutlet, show


@dataclass(frozen=True)
class Extension:
    """What is asked for.

    Attributes:
        positive, negative: the host's conditions.
        seed: of all noise.
        chunks: to add.
        size: width and height in pixels, where no given frames have one.
        prefix, end: latents [B, C, T, H, W] in the host's space that come before and after.
        state: to go on from.
        stream: how the video is written while the run goes on.
        vae: the host's, which decodes all frames for the output while the run goes on.
        resume: that finished chunks are kept on disk and taken from there.
        metadata: of the workflow, for the video.
        node_id: of the node that shows the progress.
        notes: lines for the report on what was chosen.
        live: the prompt, where it can change while the run goes on.
        video, strength: latents [B, C, T, H, W] in the host's space that chunks start from, see `FromVideo`.
    """

    positive: list
    negative: list
    seed: int
    chunks: int
    size: tuple[int, int]
    prefix: Tensor | None = None
    end: Tensor | None = None
    state: State | None = None
    stream: StreamSettings | None = None
    vae: Any = None
    resume: ResumeSettings | None = None
    metadata: dict = field(default_factory=dict)
    node_id: str | None = None
    notes: Sequence[str] = ()
    live: LivePrompt | None = None
    video: Tensor | None = None
    strength: float = STRENGTH


@dataclass(frozen=True)
class Sampling:
    """How chunks of a network of the Wan layout are sampled.

    Attributes:
        levels: noise levels, [steps + 1].
        chunk_frames: latent frames of a chunk.
        lag: ticks between the starts of two chunks.
        solver: a key of `families.SOLVERS`.
        scale: of classifier-free guidance.
        first_levels: of the first chunk where it takes more steps.
        seeing: how chunks see each other, see `ARSampler`.
        condition: noise level that a prefix is shown at.
    """

    levels: list[float]
    chunk_frames: int
    lag: int
    solver: str
    scale: float
    first_levels: list[float] | None = None
    seeing: Seeing = "causal"
    condition: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where the chunks of an extension lie in its video.

    Attributes:
        shape: of a chunk's latent, [B, C, T, H, W].
        before: latents that are there already, in the network's space, or None.
        schedule: of all chunks that are asked for.
        frames: latent frames of the whole video.
        inside: given frames that the first new chunk begins with.
        after: latents that come behind the chunks, in the network's space, or None.
        apart: each chunk's latents are a video of their own.
    """

    shape: Sequence[int]
    before: Tensor | None
    schedule: ChunkSchedule
    frames: int
    inside: int = 0
    after: Tensor | None = None
    apart: bool = False

    def parts(self, before: Tensor | None) -> Sequence[Tensor]:
        """Cuts latents that came before into what is taken at once."""
        return () if before is None else before.split(self.shape[2] if self.apart else 8, dim=2)


@dataclass(frozen=True)
class Extended:
    """What Autoregressive Extend gives.

    Attributes:
        latent: of all frames, in the host's latent space.
        state, report: of the run.
        video: that a stream wrote, if there was one.
        images: all frames, [T, H, W, 3] in [0, 1], if they were decoded.
    """

    latent: Tensor
    state: State
    report: Report
    video: OutputFile | None
    images: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What is kept of a run.

    Attributes:
        name: that stands for everything that determines it; empty where nothing is kept.
        folder: its chunks on disk, or None.
    """

    name: str = ""
    folder: RunFolder | None = None


def extend(model: comfy.model_patcher.ModelPatcher, asked: Extension, how: Sampling) -> Extended:
    """Runs the host's guider over new chunks of a network of the Wan layout."""
    check_network(model.model.diffusion_model)
    apart = how.seeing == "pictures"
    if apart:
        how = replace(how, lag=len(how.levels) - 1)
    asked = with_live(asked, steered=how.seeing in IN_ORDER)
    if asked.resume is not None and (how.seeing not in IN_ORDER or how.lag == 0 or asked.end is not None):
        raise UserError(
            "A run can be resumed where chunks follow one another and nothing is given after them; use attention "
            "'causal', a lag above 0 and no end, or disconnect 'resume'."
        )
    model = host.patched_or_off(model)
    name, state, chunk_frames = host.model_name(model), asked.state, how.chunk_frames
    shape = chunk_shape(model, asked, chunk_frames)
    if state is not None:
        state.check(name, chunk_frames, shape)
        if not state.histories and not apart:
            raise UserError(
                "The state is of a run that keeps no history (joint or rolling attention, or a given end); connect "
                "that run's latent as a prefix instead."
            )
    sampler = ARSampler(
        chunk_frames, how.lag, how.solver, how.seeing, how.first_levels, asked.prefix, asked.end, how.condition, state
    )
    schedule = sampler.schedule(asked.chunks, len(how.levels) - 1)
    lead = sampler.frames_before() % chunk_frames
    inside = lead if sampler.begins_inside(host.family_of(model)) else 0
    source = started_from(model, asked, shape, sampler.frames_before() - inside, schedule)
    if source is not None:
        if apart:
            raise UserError("LongVie 2 is led by its control videos and starts from noise; disconnect 'video'.")
        how = replace(how, levels=source.levels(how.levels), first_levels=source.first_levels(how.first_levels))
        sampler = replace(sampler, source=source, first_levels=how.first_levels)
        schedule = source.schedule(schedule)
    inwards = model.model.process_latent_in
    before, after = (None if given is None else inwards(given.cpu().float()) for given in (asked.prefix, asked.end))
    layout = Layout(
        shape,
        state.latents if state is not None else before,
        schedule,
        sampler.frames_before() - inside + asked.chunks * chunk_frames + (0 if after is None else after.shape[2]),
        inside=inside,
        after=after,
        apart=apart,
    )

    def sample(finished: FinishedChunks, earlier: State | None) -> None:
        sampler.chunks, sampler.beside = asked.chunks - finished.count, latents_held(layout, asked.stream)
        if earlier is not None:
            sampler.state, sampler.prefix = earlier, None
        sampler.listener = finished
        ticks = sampler.schedule(sampler.chunks, len(how.levels) - 1).ticks
        run_guider(model, asked, sampler, how.levels, shape, ticks, how.scale)

    kept = kept_run(model, name, asked, shape, sampler.chunks_before(), chunk_frames, lead - inside, how)
    return carry_out(model, name, asked, layout, kept, sample)


def carry_out(
    model: comfy.model_patcher.ModelPatcher,
    name: str,
    asked: Extension,
    layout: Layout,
    kept: Kept,
    sample: Callable[[FinishedChunks, State | None], None],
) -> Extended:
    """An extension from what an interrupted run left of it to its result.

    Args:
        name: of the model, for the state.
        kept: what is kept of the run.
        sample: samples the chunks that are missing, behind the state that it is given if it is given one.
    """
    patch, chunk_frames, prefix = host.patch_on(model.model_options), layout.shape[2], layout.schedule.prefix
    held = None if asked.stream is None else HELD.take(kept.name)
    if held is not None:
        return written_anew(model, asked, layout, *held)
    again, folder = HELD.let_go(kept.name), kept.folder
    anew = FAMILIES[host.family_of(model)].anew
    recent, begun = latents_needed(anew, patch.settings.history, chunk_frames)
    beginning = layout.before if asked.state is None else asked.state.begins_with(begun)
    earlier = None if folder is None else folder.load(recent, layout.before, begun, beginning)
    kept_prompts = (folder.prompts() or "") if folder is not None and earlier is not None else ""
    side = SideStream(model.load_device, patch.settings.overlap)
    outlet = new_outlet(model, asked, layout, side)
    keep = asked.stream is None or asked.stream.keep_latents
    goes_on = asked.resume is not None and asked.resume.goes_on
    untouched = Report(layout.schedule, patch.label, notes=list(asked.notes))
    finished = FinishedChunks(
        folder, outlet, keep, asked.node_id, untouched, prefix, layout.inside, goes_on, side, asked.notes,
        recent=max(1, recent), first_frames=begun, beginning=None if beginning is None else beginning[:, :, :begun],
    )  # fmt: skip
    live: LiveRun | None = None
    running: AbstractContextManager = nullcontext()
    if asked.live is not None:
        before = "" if asked.state is None else asked.state.prompts
        live = live_run(asked.live, prefix, layout.schedule.total_chunks, kept_prompts, before, finished.keep_prompts)
        finished.live, running = live, RUNS.of(live)
        if not kept_prompts:
            finished.keep_prompts("")
    video = None
    try:
        if earlier is not None:
            finished.histories, untouched.shown = earlier.by_branch, earlier.shown
            untouched.shot = earlier.shot
        finished.begin(layout.parts(layout.before), range(prefix, earlier.chunks if earlier else prefix))
        if finished.count < asked.chunks:
            with running:
                sample(finished, earlier)
        finished.report.notes += [*finished.notes, *again]
        if live is not None:
            finished.report.prompts = live.prompts(prefix + finished.count)
        if outlet is not None:
            if layout.after is not None:
                outlet.add(layout.after)
            video = outlet.finish(finished.report)
    finally:
        with closing(outlet) if outlet is not None else nullcontext():
            finished.settle()  # what an interrupt has cut off from its next tick
        if isinstance(outlet, VideoOutlet) and folder is not None:
            output = Path(folder_paths.get_output_directory())
            if video is None:
                partial_videos.note(folder.path, output, outlet.file.path)
            else:
                partial_videos.remove(folder.path, output)
    latents = torch.cat([*finished.latents, *([] if layout.after is None else [layout.after])], dim=2)
    frames = layout.frames - (asked.chunks - finished.count) * chunk_frames
    dropped, report = frames - latents.shape[2], finished.report
    state = make_state(
        latents, finished.histories, chunk_frames, name, dropped, report.shown, finished.beginning, report.shot
    )
    state = state._replace(prompts=report.prompts)
    if live is not None and finished.folder is not None and finished.count < asked.chunks:
        RUNS.to_go_on(live.prompt.node_id)
    if asked.stream is not None and asked.resume is None:
        HELD.hold(kept.name, state, finished.report)
    images = torch.cat(outlet.frames) if isinstance(outlet, FramesOutlet) else None
    return _handed_out(model, layout, latents, state, finished.report, video, images)


def new_outlet(
    model: comfy.model_patcher.ModelPatcher, asked: Extension, layout: Layout, side: SideStream
) -> Outlet | None:
    """What decodes the chunks of an extension, if anything does."""
    if asked.stream is not None:
        return VideoOutlet(asked.stream, model, layout.shape, asked.metadata, side, layout.apart)
    return None if asked.vae is None else FramesOutlet(asked.vae, model, layout.shape, side, layout.apart)


def written_anew(
    model: comfy.model_patcher.ModelPatcher, asked: Extension, layout: Layout, state: State, report: Report
) -> Extended:
    """Writes the video of a run whose latents are all there, part by part as they came."""
    assert asked.stream is not None
    side = SideStream(model.load_device, on=False)
    before = 0 if layout.before is None else layout.before.shape[2]
    after = 0 if layout.after is None else layout.after.shape[2]
    given, generated, end = state.latents.split([before, state.latents.shape[2] - before - after, after], dim=2)
    first, rest = generated.tensor_split([layout.shape[2] - layout.inside], dim=2)
    parts = [*layout.parts(given), first, *rest.split(layout.shape[2], dim=2), end]
    parts = [part for part in parts if part.shape[2]]
    with closing(VideoOutlet(asked.stream, model, layout.shape, asked.metadata, side, layout.apart)) as outlet:
        for number, part in enumerate(parts, start=1):
            throw_exception_if_processing_interrupted()
            progress_text(f"writing part {number} of {len(parts)}; nothing is sampled anew", asked.node_id)
            for frames in outlet.add(part):
                show(frames, number, len(parts))
        video = outlet.finish(report)
    return _handed_out(model, layout, state.latents, state, report, video)


def _handed_out(
    model: comfy.model_patcher.ModelPatcher,
    layout: Layout,
    latents: Tensor,
    state: State,
    report: Report,
    video: OutputFile | None,
    images: Tensor | None = None,
) -> Extended:
    """A result with its latents in the host's space, whose report is found again by them. Chunks that are videos of
    their own come as a batch, of which VAE Decode makes one video."""
    shown = model.model.process_latent_out(latents.float())
    if layout.apart:
        shown = torch.cat(shown.split(layout.shape[2], dim=2))
    host.patch_on(model.model_options).remember(shown, report)
    return Extended(shown, state, report, video, images)


def with_live(asked: Extension, steered: bool) -> Extension:
    """The same, whose prompt may change while it runs, if it is a Live Prompt; errors as for `live_prompt`."""
    return replace(asked, live=live_prompt(asked.positive, asked.negative, steered and asked.end is None))


def run_guider(model, asked: Extension, sampler, levels: list[float], shape, ticks: int, scale: float = 1.0) -> None:
    """Runs the host's guider; the sampler draws each chunk's noise [B, C, T, H, W] itself."""
    noise = torch.zeros(shape)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(asked.positive, asked.negative)
    guider.set_cfg(scale)
    callback = preview_callback(model, ticks, elsewhere=asked.stream is not None)
    sigmas = torch.tensor(levels, dtype=torch.float32)
    guider.sample(
        noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=asked.seed
    )


def latents_held(layout: Layout, stream: StreamSettings | None) -> int:
    """Works out the bytes of the latents that an extension holds in the end: by chunk, joined, and in the host's space;
    of a stream that keeps none, those of a chunk."""
    frames = layout.frames if stream is None or stream.keep_latents else layout.shape[2]
    batch, channels, _, *size = layout.shape
    return 3 * 4 * batch * channels * frames * prod(size)


def chunk_shape(model: comfy.model_patcher.ModelPatcher, asked: Extension, chunk_frames: int) -> list[int]:
    """Of a chunk's latent, [B, C, T, H, W], by the frames that are given; they are checked."""
    channels = model.get_model_object("latent_format").latent_channels
    stride = stride_of(channels)
    shape = [1, channels, chunk_frames, asked.size[1] // stride, asked.size[0] // stride]
    sizes = []
    for given in (asked.prefix, asked.end, asked.video, None if asked.state is None else asked.state.latents):
        if given is not None:
            check_latent(given, channels)
            shape = [*given.shape[:2], chunk_frames, *given.shape[3:]]
            sizes.append(pixel_size(given.shape))
    check_size(shape)
    if len(set(sizes)) > 1:
        raise UserError(f"The given frames are of sizes {sizes} (width, height); bring them to one size.")
    return shape


def started_from(
    model: comfy.model_patcher.ModelPatcher,
    asked: Extension,
    shape: Sequence[int],
    before: int,
    schedule: ChunkSchedule,
) -> FromVideo | None:
    """What an extension's chunks start from, if not from noise alone; arguments and errors as for `from_video`."""
    video = None if asked.video is None else model.model.process_latent_in(asked.video.cpu().float())
    return from_video(video, asked.strength, shape, before, schedule)


def kept_run(model, name: str, asked: Extension, shape, first: int, chunk_frames: int, lead: int, *how) -> Kept:
    """What is kept of a run, named by everything that determines it.

    Args:
        name: of the model.
        shape: of a chunk's latent, [B, C, T, H, W].
        first: chunk that is sampled.
        lead: given frames before the first chunk that fill none.
        how: settings of the sampler.
    """
    if asked.resume is None and asked.stream is None:
        return Kept()
    before = (asked.prefix, asked.state and (asked.state.latents, asked.state.histories))
    if asked.video is not None and asked.strength < 1:
        how = (*how, asked.video, asked.strength)
    determining = (
        name, weights_of(model), patches_of(model), first, chunk_frames, lead,
        determining_prompt(asked.positive), asked.negative, asked.seed, asked.chunks, shape, before, *how,
    )  # fmt: skip
    if asked.resume is None:
        with suppress(UserError):  # one that cannot be told from others is not held
            return Kept(digest(*determining, asked.end))
        return Kept()
    run = digest(*determining)
    return Kept(run, RunFolder(root(), run, asked.resume.limit, first, chunk_frames, name, lead))
