"""The host's model and VAE objects around MAGI-1's network and autoencoder."""

import logging

import comfy.float
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor

from ...flowcache_core.checkpoints import CheckpointInfo, magi_files
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.magi import fp8
from ...flowcache_core.models.magi.network import MagiNetwork, load_network, wide
from ...flowcache_core.models.magi.sampling import SHIFT
from ...flowcache_core.models.magi.text import SpecialTokens
from ...flowcache_core.models.magi.vae import LATENT_SCALE, MagiVae
from .empty_vae import empty_vae

BLOCKS = "videodit_blocks.layers."
GREY = 0.25 / 16  # nobody has published colours of this latent space, so previews are the channels' sum


class CastWeights(comfy.ops.CastWeightBiasOp):
    """Lets the host keep a layer's matrix where it likes, as it does with its own layers; `product` computes."""

    comfy_cast_weights = True

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(comfy.ops, "uncast_bias_weight"):  # ComfyUI 0.3.64
            return self.product(x, comfy.ops.cast_bias_weight(self, x)[0])
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        result = self.product(x, weight)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return result


class CastFp8(CastWeights):
    """The same for layers that know no bias, which the host asks for. What the host changes in a matrix (LoRA) is
    changed in its own numbers, not in those that are stored, and rounded to fp8 again."""

    bias = None
    weight: torch.nn.Parameter
    weight_function: list

    def forward(self, x: Tensor) -> Tensor:
        changes, self.weight_function = self.weight_function, []
        if not hasattr(comfy.ops, "uncast_bias_weight"):  # 0.3.64, whose changes call what is below themselves
            self.weight_function = changes
            return super().forward(x)
        self.changes = changes
        try:
            return super().forward(x)
        finally:
            self.weight_function, self.changes = changes, []

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if changes := getattr(self, "changes", []):
            weight = self.convert_weight(weight.float())
            for change in changes:
                weight = change(weight)
            weight = self._stored(weight, seed=0)
        return super().product(x, weight)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """Makes a matrix's own numbers of stored ones; the host calls it before a change."""
        return weight * self.factors.to(weight)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False,
        **kwargs,
    ) -> Tensor | None:  # fmt: skip
        """Stores a matrix's own numbers; the host calls it after a change."""
        stored = self._stored(weight, seed or 0)
        if return_weight:
            return stored
        if inplace_update:
            self.weight.data.copy_(stored)
        else:
            self.weight = torch.nn.Parameter(stored, requires_grad=False)
        return None

    def _stored(self, weight: Tensor, seed: int) -> Tensor:
        most = torch.finfo(fp8.FP8).max
        numbers = (weight / self.factors.to(weight)).clamp(-most, most)
        return comfy.float.stochastic_rounding(numbers, fp8.FP8, seed=seed)


class Operations(comfy.ops.manual_cast):
    """The host's layers, and MAGI-1's wide and quantised ones."""

    class WideLinear(CastWeights, comfy.ops.manual_cast.Linear):
        product = staticmethod(wide)

    class Fp8Linear(CastFp8, fp8.Fp8Linear):
        pass

    class SmoothFp8Linear(CastFp8, fp8.SmoothFp8Linear):
        pass


class MagiLatents(comfy.latent_formats.LatentFormat):
    scale_factor = LATENT_SCALE
    latent_channels = 16
    latent_dimensions = 3
    temporal_downscale_ratio = 4
    latent_rgb_factors = [[GREY] * 3] * 16


class MagiSettings(comfy.supported_models_base.BASE):
    unet_extra_config: dict = {}
    sampling_settings = {"shift": SHIFT}
    latent_format = MagiLatents
    supported_inference_dtypes = [torch.bfloat16, torch.float32]


class MagiModel(comfy.model_base.BaseModel):
    """The host's model around a MAGI-1 network; only Autoregressive Extend runs it.

    Args:
        network: over its weights.
        stored: type of the blocks' weights; the network's own is that of the computation.
        tokens: special tokens for captions, or None.
    """

    def __init__(self, network: MagiNetwork, stored: torch.dtype, tokens: SpecialTokens | None):
        settings = MagiSettings({})
        settings.set_inference_dtype(stored, None if stored == network.dtype else network.dtype)
        settings.custom_operations = Operations
        super().__init__(settings, comfy.model_base.ModelType.FLOW, unet_model=lambda **settings: network)
        self.special_tokens = tokens

    def apply_model(self, *args, **kwargs):
        raise UserError("MAGI-1 is denoised chunk by chunk with noise levels of its own: use Autoregressive Extend.")

    def memory_required(self, input_shape, cond_shapes={}) -> float:
        """Bytes of a forward over that latent [B, C, T, H, W]: what a block holds at once."""
        config = self.diffusion_model.config
        batch, _, frames, height, width = input_shape
        tokens = batch * frames * height * width / config.patch**2
        inner = config.ffn_width * (3 if config.gated else 2)
        return tokens * (10 * config.width * self.diffusion_model.dtype.itemsize + 6 * 4 * config.width + 4 * inner)


def magi_model(
    path: str, info: CheckpointInfo, weights: dict[str, Tensor], dtype: torch.dtype | None, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """The host's model from a checkpoint's weights, mapped from disk.

    Args:
        path: of the file, where special tokens may lie beside.
        dtype: of the blocks' matrices in memory, or None for the file's.
    """
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    tokens = magi_files.find_tokens(path, weights)
    if tokens is None:
        logging.warning(
            "FlowCache: no special tokens for MAGI-1, so captions go without quality and duration; put upstream's "
            "example/assets/special_tokens.npz beside the weights."
        )
    stored = info.dtype if dtype is None else dtype
    if dtype is not None:
        weights = {name: _as(tensor, dtype) if name.startswith(BLOCKS) else tensor for name, tensor in weights.items()}
    computed = management.unet_manual_cast(stored, device, MagiSettings.supported_inference_dtypes) or stored
    network = load_network(weights, info.config.distilled, computed, Operations)
    model = MagiModel(network, stored, tokens)
    patcher = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    if not management.is_device_cpu(offload):
        model.to(offload)
    return patcher(model, load_device=device, offload_device=offload)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in another type; vectors, and matrices that are fp8 in the file, stay."""
    return tensor.to(dtype) if tensor.ndim == 2 and tensor.itemsize > 1 else tensor


class VaeForHost(torch.nn.Module):
    """The autoencoder as the host calls one; latents are not yet scaled, the model's latent format does that."""

    def __init__(self, vae: MagiVae):
        super().__init__()
        self.vae = vae

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] to latents; frames beyond a multiple of 4 are dropped at the beginning, so that a
        video can be continued from its last one. Fewer than 4 are taken as an image, the last."""
        frames = video.shape[2]
        return self.vae.encode(video[:, :, frames % 4 :] if frames >= 4 else video[:, :, -1:])

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)


def magi_vae(path: str) -> comfy.sd.VAE:
    """The host's VAE object from a file of MAGI-1's autoencoder. It goes in tiles of 256 x 256 pixels and 12 frames
    whatever the node that calls it, as upstream does.

    Raises:
        UserError: see `magi_files.read_vae`.
    """
    management = comfy.model_management
    vae = empty_vae()
    module = VaeForHost(magi_files.read_vae(path))
    config = module.vae.config
    vae.latent_dim, vae.latent_channels, vae.output_channels = 3, config.latent_channels, 3
    vae.upscale_ratio = (lambda frames: 4 * frames if frames > 1 else 1, config.patch, config.patch)
    vae.upscale_index_formula = (4, config.patch, config.patch)
    vae.downscale_ratio = (lambda frames: max(1, frames // 4), config.patch, config.patch)
    vae.downscale_index_formula = (4, config.patch, config.patch)
    tile = 3 * (256 // config.patch) ** 2 * config.width * (8 + 2 * config.mlp_ratio)  # values in a block of one tile
    vae.memory_used_decode = lambda shape, dtype: (
        (tile + 4 * 64 * 2 * 3 * shape[2] * shape[3] * shape[4]) * dtype.itemsize
    )
    vae.memory_used_encode = lambda shape, dtype: (tile + 3 * shape[2] * shape[3] * shape[4]) * dtype.itemsize
    vae.working_dtypes = [torch.bfloat16, torch.float32]
    vae.device, vae.output_device = management.vae_device(), management.intermediate_device()
    vae.vae_dtype = management.vae_dtype(vae.device, vae.working_dtypes)
    vae.first_stage_model = module.to(vae.vae_dtype).eval()
    vae.disable_offload = True  # its layers are torch's own, which the host cannot leave half on the CPU
    vae.patcher = comfy.model_patcher.ModelPatcher(module, vae.device, management.vae_offload_device())
    return vae
