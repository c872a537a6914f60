"""A VAE of the host, latents of one video in, chunk after chunk, as if they were decoded in one go."""

import comfy.ldm.wan.vae
import comfy.model_management
import torch
from torch import Tensor

from ...flowcache_core.demo.vae import Memory, WanVAE
from ...flowcache_core.errors import UserError
from .magi_model import VaeForHost

OVERLAP = 4  # latent frames that are decoded again before a chunk, where a VAE cannot be carried on


def stream_decoder(vae) -> "WanDecoder | DemoDecoder | MagiDecoder | OverlapDecoder":
    """What decodes that VAE's latents; call it with a latent [1, C, T, H, W], then `finish` it.

    Each gives frames [T, H, W, 3] in [0, 1]; some may wait for the next call.

    Raises:
        UserError: the VAE is another node's own object, not the host's.
    """
    if not hasattr(vae, "first_stage_model"):
        raise UserError(
            f"The VAE is a {type(vae).__name__}, which cannot decode a video in parts; stream with the VAE of a VAE "
            "loader, or decode the latent after the run."
        )
    module = vae.first_stage_model
    if isinstance(module, WanVAE):
        return DemoDecoder(vae)
    if isinstance(module, VaeForHost):
        return MagiDecoder(vae)
    return WanDecoder(vae) if isinstance(module, comfy.ldm.wan.vae.WanVAE) else OverlapDecoder(vae)


class DemoDecoder:
    """The demo's VAE, which takes a memory along."""

    def __init__(self, vae):
        self.vae, self.memory = vae, Memory()

    def __call__(self, latent: Tensor) -> Tensor:
        return _pixels(self.vae, self.vae.first_stage_model.decode(_ready(self.vae, latent), self.memory))

    def finish(self) -> None:
        return None


class WanDecoder:
    """The host's Wan VAE, which decodes the first frame alone and then pairs; older hosts: one by one.

    What its layers keep of the frames before is on the CPU between calls.
    """

    def __init__(self, vae):
        self.vae = vae
        module = comfy.ldm.wan.vae
        self.pairs = hasattr(module, "count_cache_layers")
        count = module.count_cache_layers if self.pairs else module.count_conv3d
        self.cache = [None] * count(vae.first_stage_model.decoder)
        self.waiting: Tensor | None = None  # a frame without its partner
        self.begun = False

    def __call__(self, latent: Tensor) -> Tensor | None:
        if self.waiting is not None:
            latent = torch.cat([self.waiting, latent], dim=2)
        parts = []
        if not self.begun:
            parts, latent = [latent[:, :, :1]], latent[:, :, 1:]
            self.begun = True
        size = 2 if self.pairs else 1
        whole = latent.shape[2] // size * size
        self.waiting = latent[:, :, whole:] if whole < latent.shape[2] else None
        parts += latent[:, :, :whole].split(size, dim=2) if whole else []
        return self._decode(parts)

    def finish(self) -> Tensor | None:
        return None if self.waiting is None else self._decode([self.waiting])

    def _decode(self, parts: list[Tensor]) -> Tensor | None:
        if not parts:
            return None
        network, frames = self.vae.first_stage_model, []
        ready = [_ready(self.vae, part) for part in parts]
        self.cache = [_moved(kept, self.vae.device) for kept in self.cache]
        for part in ready:
            found = network.decoder(network.conv2(part), feat_cache=self.cache, feat_idx=[0])
            frames += found if isinstance(found, list) else [found]
        self.cache = [_moved(kept, "cpu") for kept in self.cache]
        return _pixels(self.vae, torch.cat(frames, dim=2))


class MagiDecoder:
    """MAGI-1's VAE, whose tiles of 3 latent frames stand alone."""

    def __init__(self, vae):
        self.vae = vae
        module = vae.first_stage_model.vae
        self.tile = module.tile_frames // module.config.patch_length
        self.waiting: Tensor | None = None  # frames that do not fill a tile

    def __call__(self, latent: Tensor) -> Tensor | None:
        if self.waiting is not None:
            latent = torch.cat([self.waiting, latent], dim=2)
        whole = latent.shape[2] // self.tile * self.tile
        self.waiting = latent[:, :, whole:] if whole < latent.shape[2] else None
        return _images(self.vae.decode(latent[:, :, :whole])) if whole else None

    def finish(self) -> Tensor | None:
        return None if self.waiting is None else _images(self.vae.decode(self.waiting))


class OverlapDecoder:
    """Any other video VAE: the last frames before a chunk are decoded once more with it, and thrown away."""

    def __init__(self, vae):
        self.vae = vae
        self.before: Tensor | None = None

    def __call__(self, latent: Tensor) -> Tensor:
        whole = latent if self.before is None else torch.cat([self.before, latent], dim=2)
        known = 0 if self.before is None else self._count(self.before.shape[2])
        self.before = whole[:, :, -OVERLAP:]
        return _images(self.vae.decode(whole))[known:]

    def _count(self, frames: int) -> int:
        """Pixel frames of so many latent frames."""
        ratio = self.vae.upscale_ratio[0] if isinstance(self.vae.upscale_ratio, tuple) else 1
        return ratio(frames) if callable(ratio) else frames * ratio

    def finish(self) -> None:
        return None


def _ready(vae, latent: Tensor) -> Tensor:
    """Brings the VAE to its device, and the latent with it."""
    memory = vae.memory_used_decode(latent.shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
    return latent.to(vae.device, vae.vae_dtype)


def _pixels(vae, decoded: Tensor) -> Tensor:
    return _images(vae.process_output(decoded.to(vae.output_device, torch.float32)).movedim(1, -1))


def _images(decoded: Tensor) -> Tensor:
    """Frames [T, H, W, 3] of one video [1, T, H, W, 3]."""
    return decoded[0] if decoded.ndim == 5 else decoded


def _moved(kept, device):
    return kept.to(device) if isinstance(kept, Tensor) else kept
