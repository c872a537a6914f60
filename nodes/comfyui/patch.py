"""How a run of ours lives inside a run of the host's.

A run goes through the host's guider, chunk by chunk, so that guidance, LoRA, memory management, interrupt, progress bar
and previews are ComfyUI's own. Three wrappers on a patched model connect the two: OUTER_SAMPLE makes the run's state
and always removes it, PREDICT_NOISE tells which chunk and step is asked for, DIFFUSION_MODEL runs our forward instead
of the network's. Without a run they all pass through.
"""

import hashlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...flowcache_core.checkpoints import MAGI_FAMILIES, load
from ...flowcache_core.checkpoints.gguf_files import ENDING, read_gguf
from ...flowcache_core.engine.anew import held, run_together
from ...flowcache_core.engine.build import Seeing
from ...flowcache_core.engine.rolling import rolling_bytes
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.plan import plan_memory
from ...flowcache_core.models.experts import experts_sizes
from ...flowcache_core.models.families import FAMILIES
from ...flowcache_core.models.skyreels import FRAME_RATE, add_frame_rate
from ...flowcache_core.models.wan import WanBackbone
from ...flowcache_core.report import Report
from ...flowcache_core.reuse.calibration import Calibration
from ...flowcache_core.schedule import ChunkSchedule
from ...flowcache_core.settings import OFF, Settings
from ...flowcache_core.storage import calibrations
from .captions import at_once
from .checks import adapt_others, check_finite
from .gpus import division_of, planned_share
from .guider import BOUNDARY, FAMILY, RUN, WARNINGS, compute_dtype, low_network, text_tokens
from .levels import check_flow, time_step_note
from .loaders import loaded_file
from .native import NativeRun
from .progress import say

KEY = "flowcache"  # our wrappers' key on a patched model, and the patch's in transformer_options
NATIVE = "flowcache_native"  # key of a run of the host's own sampler in transformer_options, while it goes on
MISSING = "SkyReels-V2 1.3B runs without its frame-rate layers"
SMALL_WIDTH = 1536  # of SkyReels-V2 1.3B, the one with frame-rate layers
MEMORY = "flowcache_planned_bytes"  # what a run will take of the device, told to the memory estimate


@dataclass
class Patch:
    """What the FlowCache node hangs on a model: settings, notes on them, and the reports of what was made with them."""

    settings: Settings
    label: str
    notes: Sequence[str] = ()
    reports: OrderedDict[str, Report] = field(default_factory=OrderedDict)

    def told(self, kept: Settings) -> str:
        """The label, of a run that keeps another history, as some families have their own."""
        return self.label.replace(self.settings.history.size_words, kept.history.size_words)

    def remember(self, samples: Tensor, report: Report) -> None:
        self.reports[fingerprint(samples)] = report
        while len(self.reports) > 8:
            self.reports.popitem(last=False)


def fingerprint(samples: Tensor) -> str:
    """Names a latent by its content, so that a report is found again for the latent that it is of."""
    flat = samples.detach().flatten()
    picked = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(samples.shape)).encode() + picked.numpy().tobytes()).hexdigest()


def patched(
    model: comfy.model_patcher.ModelPatcher, settings: Settings, label: str, notes: Sequence[str] = ()
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model that runs with FlowCache, whose reports say the notes; the model itself is left as it is."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options[KEY] = Patch(settings, label, notes)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def patched_or_off(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Gives the model itself where FlowCache patched it, else a clone that reuses nothing."""
    return model if patch_of(model.model_options) else patched(model, OFF, "FlowCache off")


def patch_of(model_options: dict) -> Patch | None:
    """Finds what FlowCache hung on a model, if it did."""
    return model_options.get("transformer_options", {}).get(KEY)


def patch_on(model_options: dict) -> Patch:
    """Finds what FlowCache hung on a model that it patched."""
    return model_options["transformer_options"][KEY]


def notes_of(model_options: dict) -> list[str]:
    """What the report says of a model's file, and of the settings that FlowCache hung on it."""
    guess, others = model_options.get("transformer_options", {}).get(WARNINGS, ((), ()))
    patch = patch_of(model_options)
    return [*guess, *others, *(patch.notes if patch else [])]


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """What our loader found, or what can be told from a stock loader's model."""
    named = model.model_options.get("transformer_options", {}).get(FAMILY)
    return named or ("causal" if hasattr(model.model.diffusion_model, "init_kv_caches") else "wan")


def with_family(
    model: comfy.model_patcher.ModelPatcher, family: str, hidden=None
) -> tuple[comfy.model_patcher.ModelPatcher, list[str]]:
    """Gives a clone of the model that runs as a family of the Wan 2.1 layout, and notes for the report; for "auto" the
    model itself.

    Args:
        hidden: of the node that was told the family, with its prompt and unique_id; None where there is no node.

    Raises:
        UserError: the network cannot be of that family.
    """
    if family == "auto":
        return model, []
    found, network = family_of(model), model.model.diffusion_model
    if found in MAGI_FAMILIES or (hasattr(network, "fps_embedding") and family != "skyreels"):
        raise UserError(f"The family is set to {family}, and the model is {found} by its file; set the family to auto.")
    without = family == "skyreels" and not hasattr(network, "fps_embedding")
    notes = _find_frame_rate(model, hidden) if without else []
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    _, others = options.get(WARNINGS, ((), ()))
    options.update({FAMILY: family, WARNINGS: ((), others)})
    return clone, notes


def _find_frame_rate(model: comfy.model_patcher.ModelPatcher, hidden) -> list[str]:
    """Gives a SkyReels-V2 network the frame-rate layers of its file, which the host's loader passes over, or says that
    they are missing. Nothing but a run as SkyReels-V2 asks them, so the network may keep them."""
    try:
        weights = _frame_rate_weights(model, hidden)
    except UserError as error:
        return [f"{MISSING}: {error}"] if model.model.diffusion_model.dim == SMALL_WIDTH else []
    add_frame_rate(model.model.diffusion_model, weights, comfy.ops.manual_cast)
    return []


def _frame_rate_weights(model: comfy.model_patcher.ModelPatcher, hidden) -> dict[str, torch.Tensor]:
    """The frame-rate layers of a model's file; empty for a file without them.

    Raises:
        UserError: neither the model nor the prompt names a file that can be read.
    """
    if hidden is not None and (path := loaded_file(hidden, ENDING)):
        return read_gguf(path, FRAME_RATE)
    return load(file_of(model), "skyreels")[1]


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """Tells networks of other sizes apart, for states; two files of one size pass as the same."""
    network, low = model.model.diffusion_model, low_network(model)
    told = "" if low is None else f", two experts at {model.model_options['transformer_options'][BOUNDARY]:g}"
    kind = type(network).__name__.replace("Causal", "")
    return f"{kind} {network.dim}x{len(network.blocks)} heads {network.num_heads}{told}"


def file_of(model: comfy.model_patcher.ModelPatcher) -> Path:
    """The file that a model was loaded from.

    Raises:
        UserError: its loader did not say.
    """
    loaded = getattr(model, "cached_patcher_init", None)
    if not loaded or not loaded[1] or not isinstance(loaded[1][0], str | Path):
        raise UserError(
            "The model does not say which file it was loaded from, and its calibration lies beside that; load it with "
            "Load AR Video Model (FlowCache)."
        )
    return Path(loaded[1][0])


def calibration_of(model: comfy.model_patcher.ModelPatcher) -> Calibration | None:
    """What Calibrate FlowCache wrote beside the model's file, if it did.

    Raises:
        UserError: it was of other weights, or is damaged.
    """
    try:
        file = file_of(model)
    except UserError:
        return None
    return calibrations.calibration_of(file)


class ChunkSampler(comfy.samplers.Sampler, ABC):
    """A sampler of ours, which makes its own run."""

    @abstractmethod
    def planned_bytes(self, guider, noise: Tensor, sigmas: Tensor, settings: Settings) -> int | None:
        """Works out what a run takes of the device's memory beside the network's weights; None for as much as the
        host's own forward over all frames takes."""


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    patch = patch_on(guider.model_options)
    options = guider.model_options.setdefault("transformer_options", {})
    if isinstance(sampler, ChunkSampler):
        options[MEMORY] = sampler.planned_bytes(guider, noise, sigmas, patch.settings)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    if division_of(guider.model_options) is not None:
        raise UserError(
            "FlowCache over GPUs divides runs of Autoregressive Extend and AR Sampler (FlowCache), not this sampler's; "
            "take one of those, or bypass it."
        )
    native = getattr(comfy.k_diffusion.sampling, "sample_ar_video", None)
    if native is None or getattr(sampler, "sampler_function", None) is not native:
        logging.warning(
            "FlowCache: this sampler denoises the whole video at once, so there are no chunks to reuse; the model runs "
            "as if it were not patched. Use Autoregressive Extend, AR Sampler (FlowCache) or SamplerARVideo."
        )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    if low_network(guider.model_patcher) is not None:
        raise UserError("SamplerARVideo runs one network; take Autoregressive Extend or AR Sampler (FlowCache).")
    sampling = guider.model_patcher.get_model_object("model_sampling")
    check_flow(sampling)
    notes = [*adapt_others(guider.model_options), *time_step_note(sampling)]
    model = guider.model_patcher.model
    run = NativeRun(guider, patch.settings, sampler, sigmas, noise, options, compute_dtype(model), branches_of(guider))
    options[NATIVE] = run
    options[MEMORY] = planned_bytes(
        guider, run.schedule, run.shape, patch.settings, "causal", at_once=False, lead=run.lead
    )
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model, options)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, diffusion_model, options)
    layers, network = len(model.diffusion_model.blocks), model.diffusion_model
    # The sampler would allocate history for the whole video; it only ever counts in what it is given.
    network.init_kv_caches = lambda *_args, **_kwargs: [{"end": 0} for _ in range(layers)]
    begun = time.perf_counter()
    try:
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del network.init_kv_caches
        del options[NATIVE]
    check_finite(samples, "the video")
    report = run.engine.report
    report.settings, report.seconds = patch.label, time.perf_counter() - begun
    report.notes += [*notes_of(guider.model_options), *notes, *run.guidance.notes, *run.notes]
    say(report.notes)
    patch.remember(samples, report)
    return samples


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    options = model_options.get("transformer_options", {})
    run = options.get(NATIVE)
    if run is None:
        return executor(x, timestep, model_options, seed)
    options[RUN] = run.guidance
    return run.predict(executor, x, timestep, model_options, seed)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    # Without `ar_state` a CausalWanModel runs its DIFFUSION_MODEL wrappers, of which ours answers.
    options = {name: value for name, value in transformer_options.items() if name != "ar_state"}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def diffusion_model(
    executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs
):
    """The DIFFUSION_MODEL wrapper: the run that goes on answers instead of the network's own forward."""
    return transformer_options[RUN].answer(executor.class_obj, x, context, transformer_options)


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """Asks for the memory that the run has planned, not for that of a forward over the whole video."""
    options = (kwargs.get("model_options") or {}).get("transformer_options", {})
    planned = options.get(MEMORY)
    if planned is None or len(noise_shape) != 5:
        return executor(model, noise_shape, conds, *args, **kwargs)
    batch, channels, _, height, width = noise_shape
    # The host only takes a shape: one of so many frames that it comes to the same.
    a_frame = max(1, model.memory_required([batch, channels, 1, height, width]))
    shape = [batch, channels, math.ceil(planned / a_frame), height, width]
    return executor(model, shape, conds, *args, **kwargs)


def branches_of(guider) -> int:
    """Counts the branches of guidance that a guider will ask for."""
    conds, scale = guider.conds or guider.original_conds, getattr(guider, "cfg", None)
    return sum(at_once(conds[side] or []) for side in conds if side != "negative" or scale != 1.0)


def planned_bytes(
    guider, schedule: ChunkSchedule, chunk: Sequence[int], settings: Settings, seeing: Seeing,
    at_once: bool = True, lead: int = 0,
) -> int:  # fmt: skip
    """Works out what a run of the Wan layout takes of the device's memory beside the network's weights.

    Args:
        chunk: shape of a chunk, [B, C, T, H, W].
        seeing: how chunks see each other, "causal" or "rolling".
        at_once: whether all of a tick's chunks are asked for in one call.
        lead: given frames that fill no chunk.
    """
    model = guider.model_patcher.model
    backbone = WanBackbone(model.diffusion_model)
    anew = FAMILIES[family_of(guider.model_patcher)].anew
    settings = held(anew, settings, chunk[2], schedule.max_active)
    one = backbone.sizes
    whole = one if low_network(guider.model_patcher) is None else experts_sizes(one)
    sizes, branches, together = planned_share(whole, branches_of(guider), guider.model_options)
    plan = plan_memory(
        replace(sizes, text_tokens=text_tokens(guider)),
        schedule,
        settings,
        settings.reuse.policy(schedule),
        grid=backbone.grid(*chunk[3:]),
        chunk_frames=chunk[2],
        batch=chunk[0],
        branches=branches,
        itemsize=compute_dtype(model).itemsize,
        at_once=at_once and together,
        given=(lead, 0),
        rerun=run_together(anew, chunk[2]),
    )
    if seeing == "causal":
        return plan.device_bytes
    kept = rolling_bytes(plan.network, plan.grid, schedule, chunk[2], plan.batch, plan.itemsize)
    window = replace(plan, together=plan.max_active * plan.chunk_tokens * plan.batch * plan.branches)
    return plan.branches * kept + window.activation_bytes + window.context_bytes + window.table_bytes
