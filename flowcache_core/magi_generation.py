"""MAGI-1 in one call, as `generation.generate` runs the other families."""

from collections.abc import Callable

import torch
from torch import Tensor

from .engine.from_video import STRENGTH, from_video
from .engine.loop import Chunk, Engine, Progress
from .errors import UserError
from .generation import Output, Result
from .models.magi.config import magi_usual
from .models.magi.forward import (
    PUBLISHED_FLOWCACHE,
    SHARED,
    MagiSampling,
    magi_engine,
    magi_schedule,
    magi_settings,
)
from .models.magi.network import MagiText, grouped_attention
from .models.magi.sampling import CHUNK_FRAMES
from .models.magi.text import SpecialTokens, caption_text, null_text
from .models.presets import DEFAULT_PRESET, PRESETS, describe
from .settings import Settings
from .solvers.one_step import chunk_noise
from .storage.keeping import KeptChunks
from .storage.state import State


def generate_magi(
    backbone,
    text: Tensor,
    mask: Tensor | None,
    chunks: int,
    *,
    special_tokens: SpecialTokens | None = None,
    steps: int | None = None,
    settings: Settings = PRESETS[DEFAULT_PRESET],
    seed: int = 0,
    latent_size: tuple[int, int] = (90, 90),
    device: torch.device = torch.device("cpu"),
    state: State | None = None,
    video: Tensor | None = None,
    strength: float = STRENGTH,
    model: str = "",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
    cancelled: Callable[[], bool] = lambda: False,
    keep: KeptChunks | None = None,
    parallel=None,
) -> Result:
    """Generates `chunks` chunks of 6 latent frames, or goes on from a state by so many.

    Args:
        backbone: of a MAGI-1 network.
        text: the caption's embedding [1, tokens, width], of T5 v1.1 XXL.
        mask: [1, tokens], nonzero where there is a token, which come first; None where all are.
        special_tokens: of the checkpoint, or None.
        steps: of a chunk; None takes the published number.
        device: that computes.
        settings, seed, latent_size, state, video, strength, model, on_progress, on_chunk, cancelled, keep, parallel: as
            for `generation.generate`.

    Raises:
        UserError: one line, for what does not fit.
    """
    config = backbone.config
    if text.ndim != 3 or text.shape[0] != 1 or text.shape[2] != config.caption_width:
        raise UserError(
            f"The text is {list(text.shape)}, expected an embedding [1, tokens, {config.caption_width}] of T5 v1.1 XXL."
        )
    if chunks < 1 or seed < 0:
        raise UserError(f"chunks is {chunks} and the seed {seed}; expected at least 1 chunk, and a seed of 0 or more.")
    known = video if state is None else state.latents
    size = latent_size if known is None else known.shape[3:]
    shape = (1, config.channels, CHUNK_FRAMES, *size)
    if state is not None:
        state.check(model, CHUNK_FRAMES, shape)
    done = 0 if state is None else state.frames
    schedule = magi_schedule(chunks * CHUNK_FRAMES, magi_usual(config)[0] if steps is None else steps, done)
    source = from_video(video, strength, shape, CHUNK_FRAMES * schedule.prefix, schedule)
    schedule = schedule if source is None else source.schedule(schedule)
    sampling = MagiSampling() if settings.clean_pass else PUBLISHED_FLOWCACHE
    settings = magi_settings(settings, sampling, schedule)
    if mask is None:
        mask = torch.ones(text.shape[:2])
    null = null_text(backbone.network.y_embedder.null_caption_embedding)

    def shown(chunk: int) -> MagiText:
        told = caption_text(text, mask, special_tokens, schedule.total_chunks - 1 - chunk)
        return told._replace(embedding=told.embedding.to(device))

    output = Output(device, backbone.network.dtype, settings, None, on_progress, on_chunk, keep)
    loaded = None if state is None else state.by_branch
    attention = grouped_attention
    if parallel is not None:
        parallel.check(settings, schedule.max_active)
        loaded, attention = parallel.loaded(loaded), parallel.attention(backbone, attention)
    engine: Engine = magi_engine(
        backbone,
        schedule,
        settings,
        shown,
        null._replace(embedding=null.embedding.to(device)),
        lambda chunk: chunk_noise(seed, chunk, shape).to(device),
        shape=shape,
        device=device,
        sampling=sampling,
        source=source,
        attention=attention,
        loaded=None if loaded is None else loaded.get(SHARED),
        kept="" if keep is None else "whole" if state is None else "added",
        on_progress=output.progress,
        cancelled=cancelled if parallel is None else lambda: False,
    )
    engine.report.settings = describe(settings)
    if parallel is not None:
        engine = parallel.engine(engine, cancelled)
    if state is not None:
        output.latents.append(state.latents)
    return output.result(engine, None, CHUNK_FRAMES, model, state)
