"""Everything that touches ComfyUI's internals: how a run of ours lives inside a run of the host's.

A run goes through the host's guider, chunk by chunk, so that guidance, LoRA, memory management, interrupt, progress bar
and previews are ComfyUI's own. Three wrappers on a patched model connect the two: OUTER_SAMPLE makes the run's state and
always removes it, PREDICT_NOISE tells which chunk and step is asked for, DIFFUSION_MODEL runs our forward instead of the
network's. Without a run they all pass through.
"""

import hashlib
import inspect
import json
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.utils
import latent_preview
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from server import PromptServer
from torch import Tensor

from ..flowcache_core import checkpoints
from ..flowcache_core.backbones.skyreels import add_frame_rate
from ..flowcache_core.backbones.wan import WanConfig
from ..flowcache_core.engine import Engine, Progress
from ..flowcache_core.errors import UserError
from ..flowcache_core.families import FAMILIES, SOLVERS, make_backbone
from ..flowcache_core.presets import OFF, Settings
from ..flowcache_core.report import Report, megabytes
from ..flowcache_core.runner import Runner
from ..flowcache_core.schedule import CLEAN, ChunkSchedule, Place
from ..flowcache_core.solvers import chunk_noise
from ..flowcache_core.state import State, make_state

KEY = "flowcache"  # our wrappers' key on a patched model, and the patch's in transformer_options
RUN = "flowcache_run"  # a run's key in transformer_options, while it goes on
CHUNK = "flowcache_chunk_frames"  # frames that go through the network at once, told to the memory estimate
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


def patched(model: comfy.model_patcher.ModelPatcher, settings: Settings, label: str) -> comfy.model_patcher.ModelPatcher:
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


def patch_of(model_options: dict) -> Patch | None:
    return model_options.get("transformer_options", {}).get(KEY)


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """What our loader found, or what can be told from a stock loader's model."""
    named = model.model_options.get("transformer_options", {}).get(FAMILY)
    return named or ("causal" if hasattr(model.model.diffusion_model, "init_kv_caches") else "wan")


def model_name(model: comfy.model_patcher.ModelPatcher) -> str:
    """Tells networks of other sizes apart, for states; two files of one size pass as the same."""
    network = model.model.diffusion_model
    return f"{type(network).__name__.replace('Causal', '')} {network.dim}x{len(network.blocks)} heads {network.num_heads}"


def compute_dtype(model) -> torch.dtype:
    """What the network computes in, whatever its weights are stored as; ComfyUI 0.3.64 has no method for it."""
    if hasattr(model, "get_dtype_inference"):
        return model.get_dtype_inference()
    return model.manual_cast_dtype or model.get_dtype()


class Run:
    """One run in the host: holds the engine's runner and knows which chunk and step the guider is asked for."""

    def __init__(self, model, settings: Settings, schedule: ChunkSchedule, chunk_frames: int, options: dict):
        """`model` is the host's BaseModel, `options` the transformer options of this run."""
        check_network(model.diffusion_model)
        self.runner = Runner(None, schedule, settings, chunk_frames, dtype=compute_dtype(model))
        self.place: Place | None = None
        self.sigma = 0.0
        self._branches: dict[int, list] = {}
        self._bind(model.diffusion_model, options)

    def _bind(self, network: torch.nn.Module, options: dict) -> None:
        self.runner.attention = _host_attention(options)
        name, fps = options.get(FAMILY, ""), options.get(FPS, 24)
        self.runner.backbone = make_backbone(name, network, fps, self.runner.attention)

    def forward(self, network: torch.nn.Module, x: Tensor, context: Tensor, options: dict) -> Tensor:
        """Stands in for the network's own forward, for all branches of this call. x [rows, C, T, H, W]."""
        if network is not self.runner.backbone.network:  # hooks and several GPUs swap it
            self._bind(network, options)
        names = [self._branch(index, uuid) for index, uuid in zip(options["cond_or_uncond"], options["uuids"], strict=True)]
        if context.shape[0] != x.shape[0]:
            context = context.expand(x.shape[0], -1, -1)
        return self.runner.forward(x, self.sigma, self.place, names, context, tuple(options["uuids"]))

    def _branch(self, index: int, uuid) -> str:
        """A branch's name that outlives the run: which side of guidance, and the how-manieth condition there."""
        known = self._branches.setdefault(index, [])
        if uuid not in known:
            known.append(uuid)
        return f"{index}.{known.index(uuid)}"


def check_network(network: torch.nn.Module) -> None:
    """Raises UserError for a network that cannot be run chunk by chunk."""
    if not hasattr(network, "blocks") or not hasattr(network, "patch_embedding") or not hasattr(network, "time_projection"):
        raise UserError(
            f"The model is a {type(network).__name__}; FlowCache runs networks of the Wan 2.1 text-to-video layout. "
            "Load a causal Wan, SkyReels-V2 or the demo model."
        )
    if getattr(network, "model_type", "t2v") != "t2v" or getattr(network, "in_dim", 16) != getattr(network, "out_dim", 16):
        raise UserError(
            "The model is an image-to-video Wan, which is not autoregressive; load a text-to-video layout (causal Wan, "
            "SkyReels-V2, the demo model) and give images as a prefix."
        )


def _host_attention(options: dict) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    return attention


class ARSampler(comfy.samplers.Sampler):
    """Our engine as a host's sampler: chunk after chunk through the guider that it is given.

    Args:
        chunk_frames: latent frames of a chunk.
        lag: ticks between the starts of two chunks; the number of steps, or more, is one chunk at a time.
        solver: a key of `SOLVERS`.
        prefix: latent [B, C, T, H, W] in the host's space that comes before the generated frames.
        condition: noise level that the prefix is shown at.
        state: an earlier run's state to go on from.
        on_progress: told the progress and the runner after every tick.
        on_done: given the samples in the network's latent space, and the runner, at the end.
    """

    def __init__(
        self,
        chunk_frames: int,
        lag: int,
        solver: str,
        prefix: Tensor | None = None,
        condition: float = 0.0,
        state: State | None = None,
        on_progress: Callable[[Progress, Runner], None] = lambda told, runner: None,
        on_done: Callable[[Tensor, Runner], None] = lambda samples, runner: None,
    ):
        self.chunk_frames = chunk_frames
        self.lag = lag
        self.solver = solver
        self.prefix = prefix
        self.condition = condition
        self.state = state
        self.on_progress = on_progress
        self.on_done = on_done

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Called by the host with a [B, C, T, H, W] noise; returns the sampled latent of that shape."""
        model = guider.inner_model
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        patch = patch_of(options)
        chunks = check_frames(noise, self.chunk_frames)
        if denoise_mask is not None:
            raise UserError("A noise mask was given; FlowCache extends videos instead: give the frames to keep as a prefix.")
        levels = sigmas.tolist()
        steps = len(levels) - 1
        prefix = None if self.prefix is None else model.process_latent_in(self.prefix.to(noise))
        done = self.state.chunks if self.state else 0 if prefix is None else check_frames(prefix, self.chunk_frames)
        schedule = ChunkSchedule(chunks, steps, min(self.lag, steps), prefix=done)
        settings = patch.settings if patch else OFF
        run = Run(model, settings, schedule, self.chunk_frames, options["transformer_options"])
        if self.state:
            run.runner.load(self.state.by_branch)
        options["transformer_options"][RUN] = run
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model, options, is_model_options=True)
        seed = extra_args.get("seed") or 0
        estimate = torch.zeros_like(noise)

        def frames(chunk: int) -> slice:
            return slice((chunk - done) * self.chunk_frames, (chunk - done + 1) * self.chunk_frames)

        def denoise(x: Tensor, sigma: float, place: Place) -> Tensor:
            run.place, run.sigma = place, sigma
            level = torch.full((x.shape[0],), sigma, device=x.device, dtype=torch.float32)
            clean = guider(x, level, model_options=options, seed=seed)
            if place.step == CLEAN:
                return torch.zeros_like(x)
            estimate[:, :, frames(place.chunk)] = clean
            return (x - clean) / sigma

        def start(chunk: int) -> Tensor:
            x = noise[:, :, frames(chunk)] * levels[0]
            return x if latent_image is None else x + (1 - levels[0]) * latent_image[:, :, frames(chunk)]

        def progress(told: Progress) -> None:
            self.on_progress(told, run.runner)
            if callback:
                oldest = frames(told.places[0].chunk)
                shown = estimate if told.tick == told.ticks else estimate[:, :, oldest.start :]
                callback(told.tick - 1, shown, shown, told.ticks)

        def fresh(chunk: int, step: int) -> Tensor:
            return chunk_noise(seed, chunk, start(done).shape, step).to(noise)

        engine = Engine(run.runner, denoise, levels, start, fresh, SOLVERS[self.solver], on_progress=progress)
        if prefix is not None:
            engine.prefill(prefix, self.condition)
        samples = torch.empty_like(noise)
        for index, latent in engine.run():
            check_finite(latent, f"chunk {index}")
            samples[:, :, frames(index)] = latent
        run.runner.report.settings = patch.label if patch else "FlowCache off"
        if patch:
            patch.remember(model.process_latent_out(samples.to(torch.float32)), run.runner.report)
        self.on_done(samples, run.runner)
        return samples


def check_frames(latent: Tensor, chunk_frames: int) -> int:
    """How many chunks a latent [B, C, T, H, W] holds.

    Raises:
        UserError: not a video latent, or its frames do not fill whole chunks.
    """
    if latent.ndim != 5:
        raise UserError(f"The latent has shape {tuple(latent.shape)}, expected a video latent [batch, channels, frames, height, width].")
    frames = latent.shape[2]
    if frames == 0 or frames % chunk_frames:
        below = frames // chunk_frames * chunk_frames
        near = " or ".join(str(count) for count in (below, below + chunk_frames) if count)
        pixels = " or ".join(str(4 * count - 3) for count in (below, below + chunk_frames) if count)
        raise UserError(
            f"The latent has {frames} frames, which do not fill chunks of {chunk_frames}; use {near} latent frames "
            f"({pixels} pixel frames)."
        )
    return frames // chunk_frames


def check_finite(latent: Tensor, what: str) -> None:
    """Raises UserError where a model gave NaN or infinity."""
    if not torch.isfinite(latent).all():
        raise UserError(
            f"The model gave NaN or infinite values for {what}: its weights are damaged, or overflow in this weight type; "
            "load the file again, or choose another weight type."
        )


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
        self.place = Place(chunk, CLEAN if step == steps else step, tick)
        self.sigma = 0.0 if step == steps else self.levels[step]
        if step < steps:
            self.runner.plan([self.place], [x], [self.sigma])
        result = executor(x, timestep, model_options, seed)
        if step == steps:
            self.runner.commit(chunk)
            self.runner.report.history.append((tick, self.runner.history_bytes_used))
        return result

    def _prefill(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed):
        parts = []
        for chunk, part in enumerate(x.split(self.chunk_frames, dim=2)):
            self.place, self.sigma = Place(chunk, CLEAN, 0), 0.0
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
    if isinstance(sampler, ARSampler):
        options[CHUNK] = sampler.chunk_frames
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    native = getattr(comfy.k_diffusion.sampling, "sample_ar_video", None)
    if native is None or getattr(sampler, "sampler_function", None) is not native:
        logging.warning(
            "FlowCache: this sampler denoises the whole video at once, so there are no chunks to reuse; the model runs "
            "as if it were not patched. Use Autoregressive Extend, AR Sampler (FlowCache) or SamplerARVideo."
        )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    network = guider.model_patcher.model.diffusion_model
    run = NativeRun(guider.model_patcher.model, patch, sampler, sigmas, noise, options)
    options[RUN], options[CHUNK] = run, run.chunk_frames
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model, options)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, _diffusion_model, options)
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


def _diffusion_model(executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):
    return transformer_options[RUN].forward(executor.class_obj, x, context, transformer_options)


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """Asks for the memory of one chunk's forward and of the history, not of a forward over the whole video."""
    options = (kwargs.get("model_options") or {}).get("transformer_options", {})
    chunk_frames = options.get(CHUNK)
    if chunk_frames is None or len(noise_shape) != 5:
        return executor(model, noise_shape, conds, *args, **kwargs)
    batch, channels, frames, height, width = noise_shape
    network = model.model.diffusion_model
    kept = frames
    if options[KEY].settings.history.budget is not None:
        kept = min(frames, 2 * chunk_frames * options[KEY].settings.history.budget)
    tokens = kept * math.ceil(height / 2) * math.ceil(width / 2)
    history = 2 * len(conds) * batch * len(network.blocks) * network.dim * tokens * model.model_dtype().itemsize
    # The host only takes a shape, so the history is put in as so many more frames.
    a_frame = max(1, model.memory_required([batch, channels, 1, height, width]))
    shape = [batch, channels, chunk_frames + math.ceil(history / a_frame), height, width]
    return executor(model, shape, conds, *args, **kwargs)


def load_model(
    path: str, family: str, dtype: torch.dtype | None, fps: int, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The host's model from a checkpoint of any layout that `checkpoints` reads.

    Args:
        path: of the file.
        family: "auto", or what the user says it is; causal ones get the host's causal network, where it has one.
        dtype: of the weights, or None for the host's choice.
        fps: frames a second that SkyReels-V2 is told.
        disable_dynamic: asked for by the host when it loads the model again.
    """
    info, weights = checkpoints.load(path, family)
    for warning in info.warnings:
        logging.warning("FlowCache: %s", warning)
    if info.family not in FAMILIES:
        raise UserError(f"'{os.path.basename(path)}' is a {checkpoints.FAMILIES[info.family]} file, which has no node yet.")
    model = _load_wan(weights, info.config, info.family in checkpoints.CAUSAL_FAMILIES, dtype, disable_dynamic)
    add_frame_rate(model.model.diffusion_model, weights, comfy.ops.manual_cast)
    model.model_options.setdefault("transformer_options", {}).update({FAMILY: info.family, FPS: fps})
    model.cached_patcher_init = (load_model, (path, family, dtype, fps))
    return model


def _load_wan(
    weights: dict[str, Tensor], config: WanConfig, causal: bool, dtype: torch.dtype | None, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    options = {} if dtype is None else {"dtype": dtype}
    load = comfy.sd.load_diffusion_model_state_dict
    known = inspect.signature(load).parameters
    if "metadata" not in known:
        return _load_wan_by_hand(weights, config, dtype)
    transformer = {"num_heads": config.num_heads, "text_dim": config.text_dim}
    metadata = {"config": json.dumps({"transformer": transformer | ({"causal_ar": True} if causal else {})})}
    more = {"disable_dynamic": disable_dynamic} if "disable_dynamic" in known else {}
    return load(dict(weights), model_options=options, metadata=metadata, **more)


def _load_wan_by_hand(weights: dict[str, Tensor], config: WanConfig, dtype: torch.dtype | None):
    """For hosts that take head count and text width as given (before 0.4): the same network with our sizes."""
    management = comfy.model_management
    sizes = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": config.dim,
        "out_dim": config.out_dim,
        "num_heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "patch_size": config.patch_size,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "in_dim": config.in_dim,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": config.eps,
    }
    model_config = comfy.supported_models.WAN21_T2V(sizes)
    supported = list(model_config.supported_inference_dtypes)
    count = comfy.utils.calculate_parameters(weights)
    stored = comfy.utils.weight_dtype(weights)
    chosen = dtype or management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=stored)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    model_config.set_inference_dtype(chosen, management.unet_manual_cast(chosen, device, supported))
    model = model_config.get_model(weights, "").to(offload)
    model.load_model_weights(dict(weights), "")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def video_vae(module: torch.nn.Module) -> comfy.sd.VAE:
    """The host's VAE object around a module with Wan's `encode` and `decode`, for any width and on any host.

    Args:
        module: encode [B, 3, T, H, W] in [-1, 1] to raw latents [B, 16, 1 + (T - 1) / 4, H / 8, W / 8], and decode.
    """
    vae = comfy.sd.VAE(sd={})  # finds no weights and leaves the object to be filled
    vae.first_stage_model = module.eval()
    vae.latent_dim, vae.latent_channels, vae.output_channels = 3, 16, 3
    vae.upscale_ratio = (lambda frames: max(0, 4 * frames - 3), 8, 8)
    vae.upscale_index_formula = (4, 8, 8)
    vae.downscale_ratio = (lambda frames: max(0, (frames + 3) // 4), 8, 8)
    vae.downscale_index_formula = (4, 8, 8)
    # Bytes that a decode or encode takes, after the stock entry for the Wan 2.1 VAE (whose width is 96).
    vae.memory_used_decode = lambda shape, dtype: 7000 * shape[3] * shape[4] * 64 * dtype.itemsize
    vae.memory_used_encode = lambda shape, dtype: 6000 * shape[3] * shape[4] * dtype.itemsize
    management = comfy.model_management
    vae.working_dtypes = [torch.float32]
    vae.vae_dtype = torch.float32
    vae.device, vae.output_device = management.vae_device(), management.intermediate_device()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    vae.patcher = patcher(vae.first_stage_model, load_device=vae.device, offload_device=management.vae_offload_device())
    return vae


@dataclass(frozen=True)
class Extended:
    """What Autoregressive Extend gives: all frames in the host's latent space, a state and a report."""

    latent: Tensor
    state: State
    report: Report


def extend(
    model: comfy.model_patcher.ModelPatcher,
    positive,
    negative,
    scale: float,
    seed: int,
    levels: list[float],
    chunks: int,
    chunk_frames: int,
    lag: int,
    solver: str,
    size: tuple[int, int],
    prefix: Tensor | None,
    condition: float,
    state: State | None,
    node_id: str | None,
) -> Extended:
    """Runs the host's guider over `chunks` new chunks.

    Args:
        scale: of classifier-free guidance.
        levels: noise levels, [steps + 1].
        size: width and height in pixels, where neither prefix nor state gives one.
        prefix: latent [B, C, T, H, W] in the host's space, or None.
        condition: noise level that the prefix is shown at.
        state: to go on from, or None.
        node_id: of the node that shows the progress, or None.
    """
    if patch_of(model.model_options) is None:
        model = patched(model, OFF, "FlowCache off")
    channels = model.get_model_object("latent_format").latent_channels
    shape = [1, channels, chunk_frames, size[1] // 8, size[0] // 8]
    done = 0
    if state is not None:
        shape = [*state.latents.shape[:2], chunk_frames, *state.latents.shape[3:]]
        state.check(model_name(model), chunk_frames, shape)
        done = state.chunks
    elif prefix is not None:
        check_latent(prefix, channels)
        done = check_frames(prefix, chunk_frames)
        shape = [*prefix.shape[:2], chunk_frames, *prefix.shape[3:]]
    noise = torch.cat([chunk_noise(seed, done + i, shape) for i in range(chunks)], dim=2)
    begun = time.perf_counter()
    kept = {}
    sampler = ARSampler(
        chunk_frames,
        lag,
        solver,
        prefix=prefix,
        condition=condition,
        state=state,
        on_progress=lambda told, runner: progress_text(describe(told, runner, begun), node_id),
        on_done=lambda samples, runner: kept.update(samples=samples.cpu(), runner=runner),
    )
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    ticks = ChunkSchedule(chunks, len(levels) - 1, min(lag, len(levels) - 1), done).ticks
    callback = latent_preview.prepare_callback(model, ticks)
    sigmas = torch.tensor(levels, dtype=torch.float32)
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=seed)
    latents, runner = kept["samples"], kept["runner"]
    if state is not None:
        latents = torch.cat([state.latents, latents], dim=2)
    elif prefix is not None:
        latents = torch.cat([model.model.process_latent_in(prefix.cpu().float()), latents], dim=2)
    made = make_state(latents, runner.save(), chunk_frames, model_name(model))
    return Extended(model.model.process_latent_out(latents.float()), made, runner.report)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raises UserError for a latent that is no video of that many channels, or not finite."""
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise UserError(
            f"The latent has shape {tuple(latent.shape)}, expected [batch, {channels}, frames, height, width]; use the VAE of "
            "this model family."
        )
    if not torch.isfinite(latent).all():
        raise UserError("The latent holds NaN or infinite values; check the node that made it.")


def progress_text(text: str, node_id: str | None) -> None:
    """Shows a line on the node that is running."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def describe(told: Progress, runner: Runner, begun: float) -> str:
    """Two lines on how a run goes; they fit a node's width."""
    report = runner.report
    spent = time.perf_counter() - begun
    left = spent / told.tick * (told.ticks - told.tick)
    each = spent / max(1, report.chunks_done)
    total = sum(history.bytes for history in runner.histories.values())
    return (
        f"chunk {min(report.chunks_done + 1, runner.schedule.chunks)} of {runner.schedule.chunks}, {each:.1f} s a chunk, "
        f"{left:.0f} s left\n"
        f"{report.reused:.0%} reused, history {megabytes(runner.history_bytes_used)} of {megabytes(total)}"
    )
