"""How a run of ours lives inside a run of the host's. With the other `host_*` files this is all that touches ComfyUI's
internals.

A run goes through the host's guider, chunk by chunk, so that guidance, LoRA, memory management, interrupt, progress bar
and previews are ComfyUI's own. Three wrappers on a patched model connect the two: OUTER_SAMPLE makes the run's state
and always removes it, PREDICT_NOISE tells which chunk and step is asked for, DIFFUSION_MODEL runs our forward instead
of the network's. Without a run they all pass through.
"""

import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...flowcache_core.engine.runner import Runner, Step, Text
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.families import family
from ...flowcache_core.models.presets import OFF, Settings
from ...flowcache_core.report import Report
from ...flowcache_core.reuse.calibration import Calibration, beside
from ...flowcache_core.reuse.calibration import load as load_calibration
from ...flowcache_core.schedule import CLEAN, ChunkSchedule, Place
from ...flowcache_core.solvers.weights import joined
from .checks import check_finite, check_frames, check_network, settle_with_others
from .shortcut import Shortcut, same_sum

KEY = "flowcache"  # our wrappers' key on a patched model, and the patch's in transformer_options
RUN = "flowcache_run"  # a run's key in transformer_options, while it goes on
CHUNK = "flowcache_chunk_frames"  # frames that go through the network at once, told to the memory estimate
FRAMES = "flowcache_frames"  # frames of the whole video, told to the memory estimate
HISTORY = "flowcache_history_bytes"  # and what the history will take, where a sampler of ours knows it
FPS = "flowcache_fps"  # frames a second that SkyReels-V2 is told, in transformer_options
FAMILY = "flowcache_family"  # the family that our loader found, in transformer_options


@dataclass
class Patch:
    """What the FlowCache node hangs on a model: settings, and the reports of what was made with them."""

    settings: Settings
    label: str
    reports: OrderedDict[str, Report] = field(default_factory=OrderedDict)

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
    model: comfy.model_patcher.ModelPatcher, settings: Settings, label: str
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model that runs with FlowCache; the model itself is left as it is."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options[KEY] = Patch(settings, label)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def surely_patched(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The model itself where FlowCache patched it, else a clone that reuses nothing."""
    return model if patch_of(model.model_options) else patched(model, OFF, "FlowCache off")


def patch_of(model_options: dict) -> Patch | None:
    return model_options.get("transformer_options", {}).get(KEY)


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """What our loader found, or what can be told from a stock loader's model."""
    named = model.model_options.get("transformer_options", {}).get(FAMILY)
    return named or ("causal" if hasattr(model.model.diffusion_model, "init_kv_caches") else "wan")


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """Tells networks of other sizes apart, for states; two files of one size pass as the same."""
    network = model.model.diffusion_model
    return (
        f"{type(network).__name__.replace('Causal', '')} {network.dim}x{len(network.blocks)} heads {network.num_heads}"
    )


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
    """What Calibrate FlowCache wrote beside the model's file, if it did."""
    try:
        path = beside(file_of(model))
    except UserError:
        return None
    return load_calibration(path) if path.is_file() else None


def compute_dtype(model) -> torch.dtype:
    """What the network computes in, whatever its weights are stored as; ComfyUI 0.3.64 has no method for it."""
    if hasattr(model, "get_dtype_inference"):
        return model.get_dtype_inference()
    return model.manual_cast_dtype or model.get_dtype()


class HostRun:
    """What all runs in the host have: a backbone over the host's network, and names for the branches of guidance.

    Args:
        model: the host's BaseModel.
        options: the transformer options of this run.
    """

    def __init__(self, model, options: dict):
        check_network(model.diffusion_model)
        self._branches: dict[int, list] = {}
        self.bind(model.diffusion_model, options)

    def bind(self, network: torch.nn.Module, options: dict) -> None:
        """Runs this network from now on; hooks and several GPUs swap it."""
        self.attention = _host_attention(options)
        name, fps = options.get(FAMILY, "wan"), options.get(FPS, 24)
        self.backbone = family(name).backbone(network, fps, self.attention)

    def names(self, options: dict) -> list[str]:
        """A name for each branch of a call, which outlives the run: the side of guidance, and the how-manieth there."""
        found = []
        for index, uuid in zip(options["cond_or_uncond"], options["uuids"], strict=True):
            known = self._branches.setdefault(index, [])
            if uuid not in known:
                known.append(uuid)
            found.append(f"{index}.{known.index(uuid)}")
        return found


class Run(HostRun):
    """A run chunk by chunk: holds the engine's runner and knows which chunk and step the guider is asked for."""

    def __init__(
        self,
        model,
        settings: Settings,
        schedule: ChunkSchedule,
        chunk_frames: int,
        options: dict,
        lead: int = 0,
        end: int = 0,
    ):
        self.runner = Runner(None, schedule, settings, chunk_frames, dtype=compute_dtype(model), lead=lead, end=end)
        self.steps: Sequence[Step] = []  # that the guider is asked for, one behind the other in time
        self.caption = 0  # tells texts apart that hold for some chunks only
        super().__init__(model, options)

    def bind(self, network: torch.nn.Module, options: dict) -> None:
        super().bind(network, options)
        self.runner.backbone, self.runner.attention = self.backbone, self.attention

    def forward(self, network: torch.nn.Module, x: Tensor, context: Tensor, options: dict) -> Tensor:
        """Stands in for the network's own forward, for all branches of this call. x [rows, C, T, H, W] holds all steps'
        chunks."""
        if network is not self.backbone.network:
            self.bind(network, options)
        if context.shape[0] != x.shape[0]:
            context = context.expand(x.shape[0], -1, -1)
        text = Text(context, (self.caption, *options["uuids"]))
        chunks = zip(self.steps, x.chunk(len(self.steps), dim=2), strict=True)
        steps = [step._replace(x=part) for step, part in chunks]
        return joined(list(self.runner.forward(steps, self.names(options), [text] * len(steps))), dim=2)


class ChunkSampler(comfy.samplers.Sampler):
    """A sampler of ours, which makes its own run. `chunk_frames` go through the network at once; `history_bytes` is
    what its history will take, if it knows."""

    chunk_frames: int
    history_bytes: int | None = None

    def frames(self, noise: Tensor) -> int:
        """Latent frames of the whole video, as far as the history may hold them."""
        return noise.shape[2]


def _host_attention(options: dict) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    return attention


class NativeRun(Run):
    """A run of the host's own `ar_video` sampler: place and step are read off its calls."""

    def __init__(self, model, patch: Patch, sampler, sigmas: Tensor, noise: Tensor, options: dict):
        initial = options.get("ar_config", {}).get("initial_latent")
        self.chunk_frames = sampler.extra_options.get("num_frame_per_block", 1)
        chunks = check_frames(noise, self.chunk_frames)
        prefix = 0 if initial is None else check_frames(initial, self.chunk_frames)
        self.levels = sigmas.tolist()
        steps = len(self.levels) - 1
        schedule = ChunkSchedule(chunks - prefix, steps, steps, prefix)
        # The host always makes a clean pass, which costs a forward whether its keys are kept or not.
        super().__init__(model, patch.settings, schedule, self.chunk_frames, options)
        self.runner.hold_clean()  # the host's sampler adds fresh noise at every step
        self.shortcut: Shortcut | None = None  # made at the first call, when the guider has prepared its conditions
        self.calls = 0

    def predict(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed):
        """One call of the sampler: a step of a chunk, or the pass that stores a clean one."""
        ar_state = model_options["transformer_options"]["ar_state"]
        chunk = ar_state["start_frame"] // self.chunk_frames
        steps = self.schedule.steps
        if chunk < self.schedule.prefix:
            return self._prefill(executor, x, timestep, model_options, seed)
        step = self.calls % (steps + 1)
        self.calls += 1
        tick = self.schedule.start(chunk) + min(step, steps - 1)
        place = Place(chunk, CLEAN if step == steps else step, tick)
        self.steps = [Step(x, 0.0 if step == steps else self.levels[step], place)]
        if step < steps:
            self.runner.plan(self.steps)
        if self.shortcut is None:
            self.shortcut = Shortcut(self.runner, same_sum(executor.class_obj, model_options, KEY))
        (result,) = self.shortcut(self.steps, lambda asked: (executor(x, timestep, model_options, seed) for _ in asked))
        if step == steps:
            self.runner.commit(chunk)
            self.runner.report.chunks_done += 1
            self.runner.report.history.append((tick, self.runner.history_bytes_used))
        return result

    def _prefill(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed):
        parts = []
        for chunk, part in enumerate(x.split(self.chunk_frames, dim=2)):
            self.steps = [Step(part, 0.0, Place(chunk, CLEAN, 0))]
            parts.append(executor(part, timestep, model_options, seed))
            self.runner.commit(chunk)
        return torch.cat(parts, dim=2)

    @property
    def schedule(self) -> ChunkSchedule:
        return self.runner.schedule


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    patch = patch_of(guider.model_options)
    options = guider.model_options.setdefault("transformer_options", {})
    if isinstance(sampler, ChunkSampler):
        options[CHUNK], options[FRAMES] = sampler.chunk_frames, sampler.frames(noise)
        options[HISTORY] = sampler.history_bytes
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    native = getattr(comfy.k_diffusion.sampling, "sample_ar_video", None)
    if native is None or getattr(sampler, "sampler_function", None) is not native:
        logging.warning(
            "FlowCache: this sampler denoises the whole video at once, so there are no chunks to reuse; the model runs "
            "as if it were not patched. Use Autoregressive Extend, AR Sampler (FlowCache) or SamplerARVideo."
        )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    notes = settle_with_others(guider.model_options)
    network = guider.model_patcher.model.diffusion_model
    run = NativeRun(guider.model_patcher.model, patch, sampler, sigmas, noise, options)
    run.runner.report.notes += notes
    options[RUN], options[CHUNK], options[FRAMES] = run, run.chunk_frames, noise.shape[2]
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model, options)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, diffusion_model, options)
    layers = len(network.blocks)
    # The sampler would allocate history for the whole video; it only ever counts in what it is given.
    network.init_kv_caches = lambda *_args, **_kwargs: [{"end": 0} for _ in range(layers)]
    begun = time.perf_counter()
    try:
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        del network.init_kv_caches
        del options[RUN]
    check_finite(samples, "the video")
    run.runner.report.settings = patch.label
    run.runner.report.seconds = time.perf_counter() - begun
    patch.remember(samples, run.runner.report)
    return samples


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    run = model_options.get("transformer_options", {}).get(RUN)
    if isinstance(run, NativeRun):
        return run.predict(executor, x, timestep, model_options, seed)
    return executor(x, timestep, model_options, seed)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    # Without `ar_state` a CausalWanModel runs its DIFFUSION_MODEL wrappers, of which ours answers.
    options = {name: value for name, value in transformer_options.items() if name != "ar_state"}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def diffusion_model(
    executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs
):
    """The DIFFUSION_MODEL wrapper: the run that goes on answers instead of the network's own forward."""
    network = executor.class_obj
    if context is None or context.shape[-1] != network.text_dim:
        found = "missing" if context is None else f"{context.shape[-1]} wide"
        raise UserError(
            f"A prompt's embedding is {found}, and this model reads {network.text_dim}; use the text encoder of its "
            f"family (Demo Prompt for the demo model)."
        )
    return transformer_options[RUN].forward(network, x, context, transformer_options)


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """Asks for the memory of one chunk's forward and of the history, not of a forward over the whole video."""
    options = (kwargs.get("model_options") or {}).get("transformer_options", {})
    chunk_frames = options.get(CHUNK)
    if chunk_frames is None or len(noise_shape) != 5:
        return executor(model, noise_shape, conds, *args, **kwargs)
    batch, channels, _, height, width = noise_shape
    history = options.get(HISTORY)
    if history is None:
        history = _history_bytes(model, noise_shape, len(conds), options)
    # The host only takes a shape, so the history is put in as so many more frames.
    a_frame = max(1, model.memory_required([batch, channels, 1, height, width]))
    shape = [batch, channels, chunk_frames + math.ceil(history / a_frame), height, width]
    return executor(model, shape, conds, *args, **kwargs)


def _history_bytes(model, noise_shape, branches: int, options: dict) -> int:
    """About what the keys and values of a run of a Wan network take of the device's memory."""
    if options[KEY].settings.history.memory == "system":
        return 0
    batch, _, _, height, width = noise_shape
    network, budget = model.model.diffusion_model, options[KEY].settings.history.budget
    kept = options[FRAMES] if budget is None else min(options[FRAMES], 2 * options[CHUNK] * budget)
    tokens = kept * math.ceil(height / 2) * math.ceil(width / 2)
    return 2 * branches * batch * len(network.blocks) * network.dim * tokens * model.model_dtype().itemsize
