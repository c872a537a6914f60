"""The host's model and VAE objects, made from files of ours."""

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import asdict

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...flowcache_core import checkpoints
from ...flowcache_core.checkpoints.conversion import untold
from ...flowcache_core.demo.preview import RGB_BIAS, RGB_FACTORS
from ...flowcache_core.models.latent_spaces import is_deep, stride_of
from ...flowcache_core.models.longvie import CONTROL, LongVieConfig, fit_control_layers
from ...flowcache_core.models.skyreels import add_frame_rate
from ...flowcache_core.models.wan import WanConfig
from .empty_vae import empty_vae
from .guider import FAMILY, FPS, WARNINGS, compute_dtype
from .magi_model import magi_model


def load_model(
    path: str,
    family: str,
    dtype: torch.dtype | None,
    fps: int,
    disable_dynamic: bool = False,
    on_warning: Callable[[str], None] = lambda warning: None,
) -> comfy.model_patcher.ModelPatcher:
    """The host's model from a checkpoint of any layout that `checkpoints` reads.

    Args:
        path: of the file.
        family: "auto", or what the user says it is; causal ones get the host's causal network, where it has one.
        dtype: of the weights, or None for the host's choice.
        fps: frames a second that SkyReels-V2 is told.
        disable_dynamic: asked for by the host when it loads the model again.
        on_warning: told what the user should know, in one line each, beside the log.
    """
    info, weights = checkpoints.load(path, family)
    for warning in info.warnings:
        logging.warning("FlowCache: %s", warning)
        on_warning(warning)
    if info.family in checkpoints.MAGI_FAMILIES:
        model = magi_model(path, info, weights, dtype, disable_dynamic)
    else:
        own = {name: weight for name, weight in weights.items() if not name.startswith(CONTROL)}
        model = _load_wan(own, info.config, info.family in checkpoints.CAUSAL_FAMILIES, dtype, disable_dynamic)
        if isinstance(info.config, LongVieConfig):
            computed = compute_dtype(model.model)
            fit_control_layers(model.model.diffusion_model, info.config, weights, computed, comfy.ops.manual_cast)
            model.size = 0  # the host adds it up anew, with the layers that it did not load itself
        add_frame_rate(model.model.diffusion_model, weights, comfy.ops.manual_cast)
    warnings = info.warnings[: info.guessed], info.warnings[info.guessed :]
    told = {FAMILY: info.family, FPS: fps, WARNINGS: warnings}
    model.model_options.setdefault("transformer_options", {}).update(told)
    if info.family == "demo":  # its latent space is not Wan's
        colours = model.model.latent_format
        colours.latent_rgb_factors, colours.latent_rgb_factors_bias = RGB_FACTORS, RGB_BIAS
    model.cached_patcher_init = (load_model, (path, family, dtype, fps))
    return model


def _load_wan(
    weights: dict[str, Tensor], config: WanConfig, causal: bool, dtype: torch.dtype | None, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    options = {} if dtype is None else {"dtype": dtype}
    load = comfy.sd.load_diffusion_model_state_dict
    known = inspect.signature(load).parameters
    if "metadata" not in known:
        if isinstance(config, LongVieConfig):  # such a host knows image to video by its usual sizes
            return load(dict(weights), model_options=options)
        return _load_wan_by_hand(weights, config, dtype)
    transformer = untold(config) | ({"causal_ar": True} if causal else {})
    metadata = {"config": json.dumps({"transformer": transformer})}
    more = {"disable_dynamic": disable_dynamic} if "disable_dynamic" in known else {}
    return load(dict(weights), model_options=options, metadata=metadata, **more)


def _load_wan_by_hand(weights: dict[str, Tensor], config: WanConfig, dtype: torch.dtype | None):
    """For hosts that take head count and text width as given (before 0.4): the same network with our sizes."""
    management = comfy.model_management
    sizes = asdict(config)
    del sizes["fps"]  # `add_frame_rate` does what it says
    kind = {"image_model": "wan2.1", "model_type": "t2v"}
    models = comfy.supported_models
    known = models.WAN22_T2V if is_deep(config.out_dim) else models.WAN21_T2V
    model_config = known(kind | sizes | {"window_size": (-1, -1), "qk_norm": True})
    supported = list(model_config.supported_inference_dtypes)
    count = comfy.utils.calculate_parameters(weights)
    stored = comfy.utils.weight_dtype(weights)
    chosen = dtype or management.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=stored)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    model_config.set_inference_dtype(chosen, management.unet_manual_cast(chosen, device, supported))
    model = model_config.get_model(weights, "").to(offload)
    model.load_model_weights(dict(weights), "")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def video_vae(module: torch.nn.Module, channels: int = 16) -> comfy.sd.VAE:
    """The host's VAE object around a module with Wan's `encode` and `decode`, for any width and on any host.

    Args:
        module: encode [B, 3, T, H, W] in [-1, 1] to raw latents [B, C, 1 + (T - 1) / 4, H / 8, W / 8], and decode;
            to a 16th of height and width where C is 48.
        channels: of its latents.
    """
    vae = empty_vae()
    vae.first_stage_model = module.eval()
    vae.latent_dim, vae.latent_channels, vae.output_channels = 3, channels, 3
    stride = stride_of(channels)
    vae.upscale_ratio = (lambda frames: max(0, 4 * frames - 3), stride, stride)
    vae.upscale_index_formula = (4, stride, stride)
    vae.downscale_ratio = (lambda frames: max(0, (frames + 3) // 4), stride, stride)
    vae.downscale_index_formula = (4, stride, stride)
    # Bytes that a decode or encode takes, after the stock entry for the Wan 2.1 VAE (whose width is 96).
    vae.memory_used_decode = lambda shape, dtype: 7000 * shape[3] * shape[4] * stride**2 * dtype.itemsize
    vae.memory_used_encode = lambda shape, dtype: 6000 * shape[3] * shape[4] * dtype.itemsize
    management = comfy.model_management
    vae.working_dtypes = [torch.float32]
    vae.vae_dtype = torch.float32
    vae.device, vae.output_device = management.vae_device(), management.intermediate_device()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    vae.patcher = patcher(vae.first_stage_model, load_device=vae.device, offload_device=management.vae_offload_device())
    return vae
