"""From a caption's embedding to a video's latents in one call: the engine for Python users.

from flowcache_core import presets
from flowcache_core.demo.captions import embed_caption
from flowcache_core.demo.model import load_network

result = generate(load_network(), embed_caption("a red circle"), chunks=16, settings=presets.preset("balanced"))
longer = generate(load_network(), embed_caption("a red circle"), chunks=8, state=result.state)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .engine.loop import Chunk, Engine, Progress, guidance
from .engine.runner import Runner
from .errors import UserError
from .history.streams import Pending, SideStream
from .models.presets import DEFAULT_PRESET, PRESETS, Settings, describe
from .report import Report
from .schedule import END, ChunkSchedule
from .solvers.noise_levels import magi
from .solvers.one_step import Euler, SolverFactory, chunk_noise
from .storage.state import State, make_state

Text = Tensor | Sequence[Tensor]  # one embedding [B, tokens, width], or one for each new chunk


class Result(NamedTuple):
    """Attributes:
    latents: every frame, those of the prefix or state included, [B, C, T, H, W].
    state: to go on from; `state.save_state` writes it to disk.
    report: what the run did.
    """

    latents: Tensor
    state: State
    report: Report


def generate(
    backbone,
    text: Text,
    chunks: int,
    *,
    steps: int = 64,
    lag: int = 16,
    settings: Settings = PRESETS[DEFAULT_PRESET],
    seed: int = 0,
    frames_per_chunk: int = 3,
    latent_size: tuple[int, int] = (8, 8),
    guidance_scale: float = 1.0,
    negative: Text | None = None,
    sigmas: Sequence[float] | None = None,
    solver: SolverFactory = Euler,
    state: State | None = None,
    prefix: Tensor | None = None,
    end: Tensor | None = None,
    model: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Generates `chunks` chunks, or goes on from a state or a prefix by so many.

    Chunk i's noise depends on the seed and i alone: a longer video begins like a shorter one. Latents take the text's
    device and type.

    Args:
        backbone: runs one chunk, see `backbones.wan.WanBackbone`.
        text: what the video shows; of several embeddings, the last one holds for all chunks that are left.
        steps, lag: of the schedule, see `schedule.ChunkSchedule`; the default is MAGI-1's.
        settings: what to reuse and how much history to keep.
        frames_per_chunk: latent frames.
        latent_size: height and width of the latents, where neither state nor prefix gives them.
        guidance_scale: of classifier-free guidance; 1 runs the conditional branch only.
        negative: text of the unconditional branch; needed where the scale is not 1.
        sigmas: noise levels [steps + 1], falling to 0; MAGI-1's by default.
        state: an earlier run's; nothing of it is computed again.
        prefix: given latents [B, C, T, H, W] that come before. Those that fill no chunk (an image) stay in the history
            whatever its budget is.
        end: given latents [B, C, T, H, W] that come after, which every chunk sees at their place in time. What ends so
            leaves no state to go on from.
        model: a name for the weights, kept in the state, so that another model does not go on from it.
        on_progress: called after every tick.
        on_chunk: called with each finished chunk, oldest first; on a CUDA device a tick later, where
            `settings.overlap` is on.
        cancelled: asked before every step; True ends the run with `engine.Cancelled`.

    Raises:
        UserError: one line, for every input that does not fit, before anything is run; or a model that gives NaN.
    """
    texts = _checked_texts(text, "text", backbone)
    batch, device, dtype = texts[0].shape[0], texts[0].device, texts[0].dtype
    if guidance_scale != 1.0 and negative is None:
        raise UserError(
            f"Guidance {guidance_scale} needs a negative text (its embedding may be empty); give one, or scale 1."
        )
    against = _checked_texts(negative, "negative text", backbone) if negative is not None else None
    if frames_per_chunk < 1:
        raise UserError(f"frames_per_chunk is {frames_per_chunk}, expected at least 1.")
    if seed < 0:
        raise UserError(f"The seed is {seed}, expected 0 or more.")
    shape = (batch, backbone.channels, frames_per_chunk, *latent_size)
    given = _given(state, prefix, shape, model)
    done = lead = 0
    if given is not None:
        frames = given.shape[2] if state is None else state.frames
        done, lead = divmod(frames, frames_per_chunk)
        shape = (*shape[:3], *given.shape[3:])
    if end is not None:
        _check_latents(end, "end", (*shape[:3], *(end.shape[3:] if given is None else given.shape[3:])))
        shape = (*shape[:3], *end.shape[3:])
    _check_size(shape)
    levels = _checked_sigmas(sigmas, steps)
    schedule = ChunkSchedule(chunks, steps, lag, prefix=done)

    after = 0 if end is None else end.shape[2]
    runner = Runner(backbone, schedule, settings, frames_per_chunk, lead=lead, end=after)
    runner.report.settings = describe(settings)
    if state is not None:
        runner.load(state.by_branch)
    runner.plan_history(torch.empty(shape, dtype=dtype, device="meta"), 1 if guidance_scale == 1.0 else 2)
    denoise = guidance(
        runner, _by_chunk(texts, done), None if against is None else _by_chunk(against, done), guidance_scale
    )
    side = SideStream(device, settings.overlap)
    latents = [] if given is None else [given.cpu()]

    def progress(told: Progress) -> None:
        side.settle()
        on_progress(told)

    def take(chunk: Chunk, latent: Pending[Tensor]) -> None:
        latents.append(latent.on_host())
        if not torch.isfinite(latents[-1]).all():
            raise UserError(
                f"Chunk {chunk.index} came out with NaN or infinite values: the weights are damaged or overflow in "
                f"{dtype}; use a sound checkpoint, or float32."
            )
        on_chunk(chunk)

    engine = Engine(
        runner,
        denoise,
        levels,
        start=lambda chunk: chunk_noise(seed, chunk, shape).to(device, dtype),
        noise=lambda chunk, step: chunk_noise(seed, chunk, shape, step).to(device, dtype),
        solver=solver,
        on_progress=progress,
        cancelled=cancelled,
    )
    if prefix is not None and given is not None:
        engine.prefill(given.to(device, dtype))
    if end is not None:
        engine.prefill_end(end.to(device, dtype))
    for chunk in engine.run():
        side.later(partial(take, chunk, side.to_host(chunk.latent)))  # the one read-back a chunk
    side.settle()
    whole = torch.cat(latents if end is None else [*latents, end.cpu()], dim=2)
    histories = engine.save() if end is None else {}
    dropped = 0 if state is None else state.dropped
    return Result(whole, make_state(whole, histories, frames_per_chunk, model, dropped), runner.report)


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
        if not torch.isfinite(one).all():
            raise UserError(f"The {name} holds NaN or infinite values; check the text encoder that made it.")
    return texts


def _given(state: State | None, prefix: Tensor | None, shape: tuple[int, ...], model: str) -> Tensor | None:
    """The frames that are there already, [B, C, T, H, W], checked."""
    if state is not None and prefix is not None:
        raise UserError("Both a state and a prefix are given, expected at most one: a state holds its frames already.")
    if state is not None:
        batch, channels, frames, *_ = shape
        state.check(model, frames, (batch, channels, frames, *state.latents.shape[3:]))
        if not state.histories:
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


def _check_size(shape: tuple[int, ...]) -> None:
    if len(shape) != 5 or min(shape[3:]) < 1:
        raise UserError(f"The latent size is {list(shape[3:])}, expected a height and a width of at least 1.")


def _checked_sigmas(sigmas: Sequence[float] | None, steps: int) -> list[float]:
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1.")
    levels = magi(steps) if sigmas is None else [float(sigma) for sigma in sigmas]
    falling = all(after < before for before, after in zip(levels, levels[1:], strict=False))
    if len(levels) != steps + 1 or not falling or levels[-1] != 0.0 or levels[0] > 1.0:
        raise UserError(
            f"The {len(levels)} noise levels do not fit {steps} steps: give {steps + 1}, falling from at most 1 to 0."
        )
    return levels


def _by_chunk(texts: list[Tensor], done: int) -> Tensor | Callable[[int], Tensor]:
    if len(texts) == 1:
        return texts[0]
    return lambda chunk: texts[-1 if chunk == END else min(max(chunk - done, 0), len(texts) - 1)]
