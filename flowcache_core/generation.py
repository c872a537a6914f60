"""From a caption's embedding to a video's latents in one call: the engine for Python users.

from flowcache_core import demo, generate, preset

result = generate(demo.load_network(), demo.embed_caption("a red circle"), chunks=16, settings=preset("balanced"))
longer = generate(demo.load_network(), demo.embed_caption("a blue square"), chunks=8, state=result.state)
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .engine.anew import held
from .engine.build import IN_ORDER, RunSettings, Seeing, build_engine, given_chunks
from .engine.from_video import STRENGTH, from_video
from .engine.guidance import classifier_free
from .engine.layers import has_stacks
from .engine.loop import Boundary, Chunk, Engine, Progress, Sampling, beginning_with
from .engine.pictures import Scenes
from .errors import UserError
from .history.streams import Pending, SideStream
from .models.families import Family, family, solver_of
from .models.presets import DEFAULT_PRESET, PRESETS, describe
from .report import Report
from .schedule import ChunkSchedule, Given, Shot
from .settings import Settings
from .solvers.one_step import SolverFactory, chunk_noise
from .storage.keeping import KeptChunks
from .storage.state import State, make_state

Text = Tensor | Sequence[Tensor]  # one embedding [B, tokens, width], or one for each new chunk
Noise = Callable[[int, int | None], Tensor]  # chunk, step (None: its start) -> unit noise [B, C, T, H, W]


class Result(NamedTuple):
    """Attributes:
    latents: every frame, those of the prefix or state included, [B, C, T, H, W].
    state: to go on from; `storage.state.save_state` writes it to disk.
    report: what the run did.
    """

    latents: Tensor
    state: State
    report: Report


class Change(NamedTuple):
    """What a run that goes on is told anew.

    Attributes:
        text: that the chunks which have not begun show from now on, [B, tokens, width]; None leaves what they show.
        stop: the run ends with the next chunk that is finished, or at once where none is active.
    """

    text: Tensor | None = None
    stop: bool = False


class Division(Protocol):
    """How a run is divided among processes, as far as this file is concerned."""

    def run(self, run: RunSettings) -> RunSettings: ...

    def engine(self, engine: Engine, cancelled: Callable[[], bool]) -> Engine: ...


def generate(
    backbone,
    text: Text,
    chunks: int,
    *,
    family_name: str = "demo",
    steps: int | None = None,
    lag: int | None = None,
    settings: Settings = PRESETS[DEFAULT_PRESET],
    seed: int = 0,
    frames_per_chunk: int | None = None,
    latent_size: tuple[int, int] = (8, 8),
    guidance_scale: float | None = None,
    negative: Text | None = None,
    sigmas: Sequence[float] | None = None,
    solver: SolverFactory | None = None,
    seeing: Seeing | None = None,
    scenes: Scenes | None = None,
    noise: Noise | None = None,
    state: State | None = None,
    prefix: Tensor | None = None,
    end: Tensor | None = None,
    video: Tensor | None = None,
    strength: float = STRENGTH,
    shots: Collection[int] = (),
    model: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
    cancelled: Callable[[], bool] = lambda: False,
    steer: Callable[[Boundary], Change | None] | None = None,
    keep: KeptChunks | None = None,
    parallel: Division | None = None,
) -> Result:
    """Generates `chunks` chunks, or goes on from a state or a prefix by so many.

    Chunk i's noise depends on the seed and i alone: a longer video begins like a shorter one. Latents take the text's
    device and type.

    Args:
        backbone: runs a network by layers: `models.wan.WanBackbone` or another of its kind, or two networks:
            `models.experts.ExpertsBackbone`.
        text: what the video shows; of several embeddings, the last one holds for all chunks that are left.
        family_name: whose recommended numbers hold where one is left out, a key of `models.families.FAMILIES`.
        steps, lag: of the schedule, see `schedule.ChunkSchedule`.
        settings: what to reuse and how much history to keep.
        frames_per_chunk: latent frames.
        latent_size: height and width of the latents, where no state, prefix, end or video gives them.
        guidance_scale: of classifier-free guidance; 1 runs the conditional branch only.
        negative: text of the unconditional branch; needed where the scale is not 1.
        sigmas: noise levels [steps + 1], falling to 0.
        solver: makes a chunk's solver.
        seeing: how chunks see each other: "causal" over a history, "joint" all of them at once, "rolling", or
            each from "pictures" of the one before.
        scenes: gives what a chunk that sees pictures is shown, `models.longvie.Clips`.
        noise: gives a chunk's unit noise, by default drawn from the seed.
        state: an earlier run's; nothing of it is computed again.
        prefix: given latents [B, C, T, H, W] that come before. Those that fill no chunk (an image) stay in the history
            whatever its budget is.
        end: given latents [B, C, T, H, W] that come after, which every chunk sees at their place in time. What ends so
            leaves no state to go on from.
        video: latents [B, C, T, H, W] that chunks start from instead of from noise alone, see
            `engine.from_video.FromVideo`: each from the frames at its own place in the whole video, those that are
            given before it included.
        strength: above 0 to 1: the share of its steps that a chunk takes from there; 1 is the run without the video.
        shots: numbers of chunks that begin a new shot, of a family that makes videos of several ("longlive 2").
        model: a name for the weights, kept in the state, so that another model does not go on from it.
        on_progress: called after every tick.
        on_chunk: called with each finished chunk, oldest first; on a CUDA device a tick later, where
            `settings.overlap` is on.
        cancelled: asked before every forward; True ends the run with `engine.loop.Cancelled`.
        steer: asked between ticks, and before the first; may change what later chunks show, or end the run.
        keep: takes finished chunks to disk, so that an interrupted run can be gone on from.
        parallel: this process is one of several that make the video together, `parallel.layout.Parallel`; `backbone` is
            then what it made. The first process gets the result, the others one without a history.

    Raises:
        UserError: one line, for every input that does not fit, before anything is run; or a model that gives NaN.
    """
    usual = family(family_name)
    steps, lag = schedule_numbers(usual, steps, lag)
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1.")
    scale = usual.guidance if guidance_scale is None else guidance_scale
    chunk_frames = usual.chunk_frames if frames_per_chunk is None else frames_per_chunk
    if usual.boundary is not None and not has_stacks(backbone):
        raise UserError(
            f"The family '{family_name}' runs two networks, and one is given; give models.experts.ExpertsBackbone."
        )
    if chunk_frames < 1:
        raise UserError(f"frames_per_chunk is {chunk_frames}, expected at least 1.")
    if seed < 0:
        raise UserError(f"The seed is {seed}, expected 0 or more.")
    levels = _checked_sigmas(usual.levels(steps) if sigmas is None else sigmas, steps)
    first_levels = usual.first_levels(steps) if sigmas is None else None
    texts = _checked_texts(text, "text", backbone)
    batch, device, dtype = texts[0].shape[0], texts[0].device, texts[0].dtype
    if scale != 1.0 and negative is None:
        raise UserError(f"Guidance {scale} needs a negative text (its embedding may be empty); give one, or scale 1.")
    against = _checked_texts(negative, "negative text", backbone) if negative is not None else None
    way = seeing or usual.attention
    pictures = way == "pictures"
    given = _given(state, prefix, (batch, backbone.channels, chunk_frames, *latent_size), model, pictures)
    frames = 0 if given is None else given.shape[2] if state is None else state.frames
    done, lead = divmod(frames, chunk_frames) if way in IN_ORDER else (0, 0)
    inside = None  # given frames that the first new chunk begins with
    if given is not None and state is None and lead and way == "causal" and usual.image_inside:
        given, inside = given.tensor_split([done * chunk_frames], dim=2)
        frames, lead, prefix = done * chunk_frames, 0, given
    if shots and usual.shots is None:
        raise UserError(f"Models of the family '{family_name}' make no shots; leave 'shots' out.")
    if pictures:
        _check_pictures(scenes, lead, chunk_frames, end, parallel)
    known = next((one for one in (given, end, video) if one is not None), None)
    size = latent_size if known is None else known.shape[3:]
    shape = (batch, backbone.channels, chunk_frames, *size)
    if end is not None:
        _check_latents(end, "end", shape)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"The latent size is {list(size)}, expected a height and a width of at least 1.")
    first_steps = None if done or first_levels is None else len(first_levels) - 1
    schedule = ChunkSchedule(chunks, steps, lag, prefix=done, first_steps=first_steps)
    source = from_video(video, strength, shape, frames, schedule)
    if source is not None:
        if pictures:
            raise UserError("A run from pictures is led by its scenes and starts from noise; leave 'video' out.")
        schedule, levels = source.schedule(schedule), source.levels(levels)
        first_levels = source.first_levels(first_levels)
    shown = Shown(_by_chunk(texts, done), schedule, steer, partial(_checked_change, texts[0], backbone))
    negative_text = None if against is None else _by_chunk(against, done)
    guidance = classifier_free(shown.text if steer else _by_chunk(texts, done), negative_text, scale)

    def start(chunk: int) -> Tensor:
        drawn = (chunk_noise(seed, chunk, shape) if noise is None else noise(chunk, None)).to(texts[0])
        return drawn if source is None else source.start(chunk, drawn, sampling.levels(chunk, schedule)[0])

    def fresh(chunk: int, step: int) -> Tensor:
        return (chunk_noise(seed, chunk, shape, step) if noise is None else noise(chunk, step)).to(texts[0])

    sampling = Sampling(levels, start, fresh, solver or solver_of(backbone, usual.solver(steps)), first_levels)
    sampling = beginning_with(sampling, done, inside)
    kept = held(usual.anew, settings, chunk_frames, schedule.max_active) if way == "causal" else settings
    output = Output(device, dtype, settings, given, on_progress, on_chunk, keep)
    run = RunSettings(
        backbone, guidance, schedule, settings, sampling, way, shape, len(guidance.texts), dtype, device,
        texts=len(texts) if steer is None else schedule.max_active + 1,
        text_tokens=max(text.shape[1] for text in [*texts, *(against or [])]),
        lead=lead,
        end=0 if end is None else end.shape[2],
        beside=2 * dtype.itemsize * prod(shape) * chunks,  # by chunk, and joined
        loaded=None if state is None else state.by_branch,
        on_progress=output.progress,
        scenes=scenes,
        cancelled=cancelled,
        steer=shown.steered,
        label=describe(settings, kept.history),
        anew=usual.anew,
        before=None if state is None else state.before(usual.anew),
        shots=usual.shots,
        new_shot=lambda chunk: chunk in shots,
        shot=Shot() if state is None else state.shot,
    )  # fmt: skip
    if steer is not None and (way != "causal" or parallel is not None):
        raise UserError("A run is steered where chunks follow one another, in one process; leave 'steer' out.")
    engine = build_engine(run if parallel is None else parallel.run(run))
    engine.report.notes += [] if source is None else [source.note(levels)]
    if parallel is not None:
        engine = parallel.engine(engine, cancelled)
    together = chunk_frames if way in IN_ORDER or prefix is None else prefix.shape[2]  # a window takes them as one
    before = given if pictures else prefix  # pictures are made from latents, of which a state holds some
    for chunk, latent in given_chunks(before, lead, together) if before is not None else []:
        engine.give(chunk, latent.to(device, dtype))
    if end is not None:
        engine.give(Given.END, end.to(device, dtype))
    return output.result(engine, end, chunk_frames, model, state)


class Shown:
    """The texts of a run that is steered.

    Args:
        text: of each chunk, as long as nothing is changed.
        schedule: of the run.
        steer: as for `generate`.
        check: of a text that it is told.
    """

    def __init__(
        self,
        text: Tensor | Callable[[int | Given], Tensor],
        schedule: ChunkSchedule,
        steer: Callable[[Boundary], Change | None] | None,
        check: Callable[[Tensor], Tensor],
    ):
        self.before, self.schedule, self.steer, self.check = text, schedule, steer, check
        self.changed: list[tuple[int, Tensor]] = []  # the first chunk of each text, and the text; oldest first

    def text(self, chunk: int | Given) -> Tensor:
        """What a chunk shows, [B, tokens, width]."""
        for first, text in reversed(self.changed):
            if isinstance(chunk, int) and first <= chunk:
                return text
        return self.before(chunk) if callable(self.before) else self.before

    def steered(self, ahead: Boundary) -> bool:
        """Takes what is changed between two ticks; says whether the run shall end."""
        change = None if self.steer is None else self.steer(ahead)
        if change is None:
            return False
        if change.text is not None:
            self.changed = [one for one in self.changed if one[0] < ahead.chunk]
            self.changed.append((ahead.chunk, self.check(change.text)))
            seen = ahead.chunk - self.schedule.max_active - 1  # the oldest chunk that may still ask for its text
            while len(self.changed) > 1 and self.changed[1][0] <= seen:
                del self.changed[0]
        return change.stop


class Output:
    """Takes what a run gives: chunks to the CPU, progress to its listener, everything together in the end.

    Args:
        device, dtype: that is computed with.
        settings, on_progress, on_chunk, keep: as for `generate`.
        given: latents that come before, or None.
    """

    def __init__(self, device, dtype, settings: Settings, given: Tensor | None, on_progress, on_chunk, keep):
        self.side, self.dtype = SideStream(device, settings.overlap), dtype
        self.latents = [] if given is None else [given.cpu()]
        self.on_progress, self.on_chunk = on_progress, on_chunk
        self.keep: KeptChunks | None = keep
        self.engine: Engine | None = None  # once it runs

    def progress(self, told: Progress) -> None:
        self.side.settle()
        if self.keep is not None and self.engine is not None:
            self.keep.settle(self.engine)
        self.on_progress(told)

    def result(
        self, engine: Engine, end: Tensor | None, chunk_frames: int, model: str, state: State | None = None
    ) -> Result:
        """Runs the engine to its end; it goes on from a state, if it does from any."""
        self.engine = engine
        for chunk in engine.run():
            if self.keep is not None:
                self.keep.chunk(chunk, engine)
            self.side.later(partial(self._take, chunk, self.side.to_cpu(chunk.latent)))  # the one read-back a chunk
        self.side.settle()
        whole = torch.cat(self.latents if end is None else [*self.latents, end.cpu()], dim=2)
        histories = engine.save() if end is None else {}
        if self.keep is not None:
            self.keep.settle(engine)
        dropped, beginning = (0, None) if state is None else (state.dropped, state.beginning)
        made = make_state(
            whole, histories, chunk_frames, model, dropped, engine.report.shown, beginning, engine.report.shot
        )
        return Result(whole, made, engine.report)

    def _take(self, chunk: Chunk, latent: Pending[Tensor]) -> None:
        self.latents.append(latent.on_cpu())
        if not torch.isfinite(self.latents[-1]).all():
            raise UserError(
                f"Chunk {chunk.number} came out with NaN or infinite values: the weights are damaged or overflow in "
                f"{self.dtype}; use a sound checkpoint, or float32."
            )
        self.on_chunk(chunk)


def schedule_numbers(usual: Family, steps: int | None, lag: int | None) -> tuple[int, int]:
    """Steps and lag, as recommended where they are not told; another number of steps keeps the share of the lag."""
    steps = usual.steps if steps is None else steps
    return steps, max(1, round(steps * usual.lag / usual.steps)) if lag is None else lag


def _checked_texts(text: Text, name: str, backbone) -> list[Tensor]:
    texts = [text] if isinstance(text, Tensor) else list(text)
    if not texts:
        raise UserError(f"The {name} is an empty list; give an embedding [batch, tokens, width] or one for each chunk.")
    width = backbone.text_dim
    for one in texts:
        if not isinstance(one, Tensor) or one.ndim != 3 or one.shape[2] != width:
            found = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise UserError(
                f"The {name} is {found}, expected an embedding [batch, tokens, {width}]; use this model's encoder."
            )
        if one.shape[0] != texts[0].shape[0]:
            raise UserError(
                f"The {name}s have batches of {texts[0].shape[0]} and {one.shape[0]}, expected the same for all."
            )
        if one.dtype != (getattr(backbone, "dtype", None) or one.dtype):
            raise UserError(f"The {name} is {one.dtype}, expected {backbone.dtype} as the network is; cast it.")
        if not torch.isfinite(one).all():
            raise UserError(f"The {name} holds NaN or infinite values; check the text encoder that made it.")
    return texts


def _checked_change(text: Tensor, backbone, change: Tensor) -> Tensor:
    """A text that a run is told while it goes on, which stands beside the one that it began with."""
    return _checked_texts([text, change], "text", backbone)[1].to(text.device)


def _check_pictures(scenes, lead: int, chunk_frames: int, end: Tensor | None, parallel: Division | None) -> None:
    """Of a run whose chunks begin with pictures of the one before."""
    if scenes is None:
        raise UserError(
            "This family is led by videos and pictures: give scenes (models.longvie.Clips), or run it in ComfyUI."
        )
    if lead:
        raise UserError(
            f"The given frames leave {lead} over that fill no chunk of {chunk_frames}; give whole chunks of an earlier "
            "run, or the picture that the video begins with as the start of the scenes."
        )
    if end is not None or parallel is not None:
        raise UserError("A run from pictures takes no end and goes in one process; leave 'end' and 'parallel' out.")


def _given(
    state: State | None, prefix: Tensor | None, shape: tuple[int, ...], model: str, pictures: bool
) -> Tensor | None:
    """The frames that are there already, [B, C, T, H, W], checked."""
    if state is not None and prefix is not None:
        raise UserError("Both a state and a prefix are given, expected at most one: a state holds its frames already.")
    if state is not None:
        state.check(model, shape[2], (*shape[:3], *state.latents.shape[3:]))
        if not state.histories and not pictures:
            raise UserError("The state is of a video that has its end and keeps no history; go on from another one.")
        if not torch.isfinite(state.latents).all():
            raise UserError("The state holds NaN or infinite latents; go on from another one.")
        return state.latents
    if prefix is None:
        return None
    _check_latents(prefix, "prefix", (*shape[:3], *prefix.shape[3:]))
    return prefix


def _check_latents(given: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Of frames that are given, whatever their number."""
    batch, channels, _, *size = shape
    if given.ndim != 5 or given.shape[:2] != (batch, channels) or list(given.shape[3:]) != size:
        wanted = "height, width" if given.shape[:2] != (batch, channels) else ", ".join(map(str, size))
        raise UserError(
            f"The {name} has shape {list(given.shape)}, expected [{batch}, {channels}, frames, {wanted}]; "
            "encode it with this model's VAE, one video for each text."
        )
    if given.shape[2] == 0:
        raise UserError(f"The {name} has no frames; give at least one.")
    if not torch.isfinite(given).all():
        raise UserError(f"The {name} holds NaN or infinite values; check the VAE or file that it comes from.")


def _checked_sigmas(sigmas: Sequence[float], steps: int) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    falling = all(after < before for before, after in zip(levels, levels[1:], strict=False))
    if len(levels) != steps + 1 or not falling or levels[-1] != 0.0 or levels[0] > 1.0:
        raise UserError(
            f"The {len(levels)} noise levels do not fit {steps} steps: give {steps + 1}, falling from at most 1 to 0."
        )
    return levels


def _by_chunk(texts: list[Tensor], done: int) -> Tensor | Callable[[int | Given], Tensor]:
    """The text of each chunk, the first of which is number `done`; frames that are given take that of their end."""

    def text_of(chunk: int | Given) -> Tensor:
        if isinstance(chunk, Given):
            return texts[0 if chunk is Given.LEAD else -1]
        return texts[min(max(chunk - done, 0), len(texts) - 1)]

    return texts[0] if len(texts) == 1 else text_of
