"""MAGI-1 in Autoregressive Extend: its own sampler as one of the host's.

The host's guider prepares the run (memory, LoRA, conditions, progress, previews) and then hands over: MAGI-1's branches
are no positive and negative, and share one history, so the sampler runs them itself and does not come back for each
step.
"""

from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...flowcache_core.engine.from_video import FromVideo
from ...flowcache_core.engine.loop import Boundary, Progress
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.snapshot import Snapshot
from ...flowcache_core.models.magi.config import magi_usual
from ...flowcache_core.models.magi.forward import (
    PUBLISHED_FLOWCACHE,
    SHARED,
    Kept,
    MagiSampling,
    magi_engine,
    magi_plan,
    magi_schedule,
    magi_settings,
)
from ...flowcache_core.models.magi.network import MagiBackbone, MagiText
from ...flowcache_core.models.magi.sampling import CHUNK_FRAMES, SHIFT, WINDOW, GuidanceScales, sigmas
from ...flowcache_core.models.magi.text import SpecialTokens, caption_text, null_text
from ...flowcache_core.schedule import ChunkSchedule
from ...flowcache_core.settings import Settings
from ...flowcache_core.solvers.one_step import chunk_noise
from ...flowcache_core.storage.state import State
from . import gpus
from . import patch as host
from .captions import ChunkCaptions, embedding_of
from .checks import adapt_others, check_finite
from .extend import (
    Extended,
    Extension,
    Layout,
    carry_out,
    chunk_shape,
    kept_run,
    latents_held,
    run_guider,
    started_from,
    with_live,
)
from .finished import FinishedChunks
from .guider import FUNCTIONS, WRAPPERS, fitted, host_attention
from .listener import RunListener
from .model_patches import unheeded_by_magi
from .steering import Steering

PROMPT = "flowcache_magi"  # key of a `Prompt` in a conditioning


@dataclass(frozen=True)
class Prompt:
    """What MAGI-1 Prompt puts beside an embedding.

    Attributes:
        text: the cleaned prompt.
        tokens: special tokens in front of it, keys of `magi_text.ROWS`.
    """

    text: str
    tokens: tuple[str, ...]


def text_of(condition: dict, embedding: Tensor, width: int, tokens: SpecialTokens | None, remaining: int) -> MagiText:
    """A chunk's text from one of the host's conditions, made by MAGI-1 Prompt or by another node that gives T5 v1.1
    XXL's output.

    Args:
        embedding: that it shows the chunk, [1, tokens, width].
        width: of the embeddings that the network reads.
        tokens: special tokens, or None.
        remaining: chunks after this one.

    Raises:
        UserError: another text encoder's.
    """
    mask = condition.get("attention_mask")
    if embedding.ndim != 3 or embedding.shape[0] != 1 or embedding.shape[-1] != width:
        raise UserError(
            f"The caption's embedding is {list(embedding.shape)}, expected [1, tokens, {width}] of T5 v1.1 XXL: "
            "load that encoder with type 'mochi' and use MAGI-1 Prompt."
        )
    mask = torch.ones(embedding.shape[:2]) if mask is None else mask.reshape(1, -1)
    names = condition[PROMPT].tokens if PROMPT in condition else ("hq",)
    return caption_text(embedding, mask, tokens, remaining, names)


@dataclass(kw_only=True)
class MagiSampler(host.ChunkSampler):
    """MAGI-1's engine as a sampler of the host.

    Attributes:
        schedule, sampling, seed: of the run.
        given: latent frames [B, C, T, H, W] before the generated ones, in the network's space, or None.
        loaded: the clean history of an earlier run that holds them, or None.
        kept: how the run is kept on disk, see `MagiForward`.
        beside: bytes of latents that the caller will hold in the end.
        listener: is told of the run.
        may_stop: whether it may end the run.
        source: a video that its chunks start from.
    """

    schedule: ChunkSchedule
    sampling: MagiSampling
    seed: int
    given: Tensor | None
    loaded: Snapshot | None
    kept: Kept
    beside: int
    listener: RunListener
    may_stop: bool = False
    source: FromVideo | None = None
    chunk_frames: int = CHUNK_FRAMES

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Called by the host with a tensor of a chunk's shape [B, C, T, H, W]; returns the last chunk."""
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        family = host.family_of(guider.model_patcher)
        with gpus.led(guider, options, family, 1, self.listener.settle) as led:
            return self._run(guider, options, callback, noise, latent_image, led)

    def _run(
        self, guider, options: dict, callback, noise: Tensor, latent_image: Tensor | None, led: gpus.Led | None
    ) -> Tensor:
        model, schedule, device = guider.inner_model, self.schedule, noise.device
        patch = host.patch_on(options)
        network, batch = model.diffusion_model, noise.shape[0]
        notes = [*adapt_others(options), *unheeded_by_magi(guider, options, FUNCTIONS, WRAPPERS, host.KEY)]
        attention = host_attention(lambda: options["transformer_options"])
        captions = ChunkCaptions(guider.conds)

        def text(chunk: int) -> MagiText:
            positive = captions.of(chunk)["positive"]
            if len(positive) != 1:
                raise UserError(f"There are {len(positive)} positive captions for chunk {chunk}; MAGI-1 takes one.")
            width, remaining = network.config.caption_width, schedule.total_chunks - 1 - chunk
            shown = embedding_of(positive[0], chunk, positive[0]["cross_attn"])
            return rows(text_of(positive[0], shown, width, model.special_tokens, remaining), batch, device)

        def progress(told: Progress) -> None:
            self.listener.progress(told, engine)
            if callback:
                shown = engine.advanced[0].estimate()
                callback(told.tick - 1, shown, shown, told.ticks)

        backbone = fitted(MagiBackbone(network, attention), options["transformer_options"])
        made: dict[str, Any] = {"backbone": backbone, "attention": attention, "loaded": self.loaded}
        if led is not None:
            made = led.magi(
                led.backbone(backbone), attention, self.loaded, schedule=schedule, settings=patch.settings,
                sampling=self.sampling, shape=tuple(noise.shape), kept=self.kept, may_stop=self.may_stop,
            )  # fmt: skip
            notes += led.notes

        def steer(ahead: Boundary) -> bool:
            report, seed = engine.report, self.seed
            steering = Steering(guider, captions, noise, latent_image, seed, schedule, report)
            return self.listener.steer(ahead, steering)

        engine = magi_engine(
            schedule=schedule,
            settings=patch.settings,
            text=text,
            null=rows(null_text(network.y_embedder.null_caption_embedding), batch, device),
            start=lambda chunk: chunk_noise(self.seed, chunk, tuple(noise.shape)).to(noise),
            shape=noise.shape,
            device=device,
            sampling=self.sampling,
            given=None if self.given is None else self.given.to(noise),
            source=self.source,
            kept=self.kept,
            beside=self.beside,
            on_progress=progress,
            cancelled=interrupted,
            steer=steer if self.may_stop else None,
            **made,
        )
        engine.report.settings = patch.label
        engine.report.notes += [*host.notes_of(options), *notes]
        self.listener.plan(engine.report)
        for chunk in engine.run():
            check_finite(chunk.latent, f"chunk {chunk.number}")
            self.listener.chunk(chunk, engine)
        self.listener.done(engine, keeps_history=True)
        return chunk.latent

    def planned_bytes(self, guider, noise: Tensor, sigmas: Tensor, settings: Settings) -> int:
        """Works out what a run takes of the device's memory beside the network's weights."""
        network = guider.model_patcher.model.diffusion_model
        kept = magi_settings(settings, self.sampling, self.schedule)
        sizes, _, together = gpus.planned_share(network.config.sizes, 1, guider.model_options)
        plan = magi_plan(
            network.config, self.schedule, kept, self.sampling, noise.shape, network.dtype.itemsize, together
        )
        return replace(plan, network=sizes).device_bytes


def extend(model: comfy.model_patcher.ModelPatcher, asked: Extension, steps: int, guidance: float) -> Extended:
    """Runs MAGI-1 over new chunks; frames of a prefix that fill no chunk are the first of them.

    Args:
        steps: of a chunk, or 0 for the published number.
        guidance: scale of the caption, or 0 for the published one; a distilled network takes none.
    """
    model = host.patched_or_off(model)
    settings, config = host.patch_on(model.model_options).settings, model.model.diffusion_model.config
    asked = with_live(asked, steered=True)
    name, state = model_name(model), asked.state
    check_negative(asked.negative)
    usual_steps, usual_size = magi_usual(config)
    steps = steps or usual_steps
    width, height = (mine or usual for mine, usual in zip(asked.size, usual_size, strict=True))
    shape = chunk_shape(model, replace(asked, size=(width, height)), CHUNK_FRAMES)
    given = None if asked.prefix is None else model.model.process_latent_in(asked.prefix.cpu().float())
    before = given if state is None else state.latents
    if state is not None:
        state.check(name, CHUNK_FRAMES, shape)
    frames = state.frames if state is not None else 0 if before is None else before.shape[2]
    inside = frames % CHUNK_FRAMES
    schedule = magi_schedule(asked.chunks * CHUNK_FRAMES - inside, steps, frames)
    source = started_from(model, asked, shape, frames - inside, schedule)
    schedule = schedule if source is None else source.schedule(schedule)
    levels = sigmas(steps) if source is None else source.levels(sigmas(steps))
    sampling = replace(
        MagiSampling() if settings.clean_pass else PUBLISHED_FLOWCACHE, guidance=scales(guidance, config.distilled)
    )
    magi_settings(settings, sampling, schedule)  # refuses what cannot be run

    layout = Layout(shape, before, schedule, schedule.total_chunks * CHUNK_FRAMES, inside)

    def sample(finished: FinishedChunks, earlier: State | None) -> None:
        begun, left = state, schedule
        if earlier is not None:
            begun = earlier
            left = magi_schedule(schedule.total_chunks * CHUNK_FRAMES - earlier.frames, steps, earlier.frames)
            left = left if source is None else source.schedule(left)
        sampler = MagiSampler(
            schedule=left,
            sampling=sampling,
            seed=asked.seed,
            given=given,
            loaded=None if begun is None else begun.by_branch.get(SHARED),
            kept="" if asked.resume is None else "whole" if earlier is None else "added",
            beside=latents_held(layout, asked.stream),
            listener=finished,
            may_stop=asked.live is not None,
            source=source,
        )
        run_guider(model, asked, sampler, levels, shape, left.ticks)

    how = (steps, sampling, model.model.special_tokens)
    kept = kept_run(model, name, asked, shape, schedule.prefix, CHUNK_FRAMES, 0, *how)
    return carry_out(model, name, asked, layout, kept, sample)


def check_fixed(steps: int, end: Tensor | None, **settings) -> None:
    """Raises UserError for settings of Autoregressive Extend that MAGI-1 does not have."""
    possible = {
        "frames_per_chunk": (0, CHUNK_FRAMES),
        "lag": (-1, steps // WINDOW) if steps else (-1,),
        "solver": ("auto", "euler"),
        "attention": ("auto", "causal"),
        "shift": (0.0, SHIFT),
        "condition_noise": (-1.0,),
    }
    for name, value in settings.items():
        if value not in possible[name]:
            raise UserError(
                f"{name} is {value}, and MAGI-1 knows only {' or '.join(map(str, possible[name]))}; set that."
            )
    if end is not None:
        raise UserError("MAGI-1 cannot be given an end; leave the latent 'end' unconnected.")


def check_negative(negative: list) -> None:
    """Raises UserError for a negative prompt; MAGI-1 guides away from its own empty caption."""
    texts = [more[PROMPT].text for _, more in negative if PROMPT in more]
    if any(texts):
        raise UserError(f"The negative prompt is '{texts[0]}', and MAGI-1 takes none; leave that MAGI-1 Prompt empty.")


def scales(guidance: float, distilled: bool) -> GuidanceScales:
    """The published scales by noise level, with the caption's set to `guidance` where it counts at all."""
    if distilled and guidance not in (0.0, 1.0):
        raise UserError(
            f"guidance is {guidance}, and a distilled MAGI-1 takes none; set 0, or choose the family 'magi'."
        )
    usual = GuidanceScales()
    return replace(usual, text=tuple(guidance if scale else 0.0 for scale in usual.text)) if guidance else usual


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """Tells networks apart for states, as far as their sizes do."""
    config = model.model.diffusion_model.config
    return f"MAGI-1 {config.width}x{config.layers} heads {config.heads}" + " distilled" * config.distilled


def interrupted() -> bool:
    """Ends the run with the host's own exception when the user asked for it."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return False


def rows(text: MagiText, batch: int, device: torch.device) -> MagiText:
    """The text for every row of a batch, on a device."""
    embedding, mask = text.embedding.to(device).expand(batch, -1, -1), text.mask.expand(batch, -1)
    return text._replace(embedding=embedding, mask=mask)
