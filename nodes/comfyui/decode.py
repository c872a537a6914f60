"""A VAE of the host, latents of one video in, chunk after chunk, as if they were decoded in one go."""

from abc import ABC, abstractmethod

import comfy.ldm.wan.vae
import comfy.model_management
import torch
from torch import Tensor

from ...flowcache_core.demo.vae import Memory, WanVAE
from ...flowcache_core.errors import UserError
from .magi_model import VaeForHost

OVERLAP = 4  # latent frames that are decoded again before a chunk, where a VAE cannot be carried on


def stream_decoder(vae) -> "StreamDecoder":
    """What decodes that VAE's latents.

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


class StreamDecoder(ABC):
    """Call it with a latent [1, C, T, H, W], then `finish` it.

    Each gives frames [T, H, W, 3] in [0, 1]; some may wait for the next call.
    """

    def __init__(self, vae):
        self.vae = vae

    @abstractmethod
    def __call__(self, latent: Tensor) -> Tensor | None:
        """Decodes the next frames."""

    def finish(self) -> Tensor | None:
        """Decodes what still waits."""
        return None


class DemoDecoder(StreamDecoder):
    """The demo's VAE, which takes a memory along."""

    def __init__(self, vae):
        super().__init__(vae)
        self.memory = Memory()

    def __call__(self, latent: Tensor) -> Tensor:
        return _pixels(self.vae, self.vae.first_stage_model.decode(_ready(self.vae, latent), self.memory))


class TileDecoder(StreamDecoder):
    """A VAE that takes so many latent frames at a time; those that do not fill a tile wait for their others.

    Args:
        first, tile: latent frames of the first tile, and of all others.
    """

    def __init__(self, vae, first: int, tile: int):
        super().__init__(vae)
        self.next, self.tile = first, tile
        self.waiting: Tensor | None = None

    @abstractmethod
    def decode(self, tiles: list[Tensor]) -> Tensor:
        """Decodes tiles that follow one another."""

    def __call__(self, latent: Tensor) -> Tensor | None:
        waiting = latent if self.waiting is None else torch.cat([self.waiting, latent], dim=2)
        tiles = []
        while waiting.shape[2] >= self.next:
            tiles.append(waiting[:, :, : self.next])
            waiting, self.next = waiting[:, :, self.next :], self.tile
        self.waiting = waiting
        return self.decode(tiles) if tiles else None

    def finish(self) -> Tensor | None:
        return None if self.waiting is None or not self.waiting.shape[2] else self.decode([self.waiting])


class WanDecoder(TileDecoder):
    """The host's Wan VAE, which decodes the first frame alone and then pairs; older hosts: one by one.

    What its layers keep of the frames before is on the CPU between calls.
    """

    def __init__(self, vae):
        module = comfy.ldm.wan.vae
        pairs = hasattr(module, "count_cache_layers")
        super().__init__(vae, 1, 2 if pairs else 1)
        count = module.count_cache_layers if pairs else module.count_conv3d
        self.cache = [None] * count(vae.first_stage_model.decoder)

    def decode(self, tiles: list[Tensor]) -> Tensor:
        network, frames = self.vae.first_stage_model, []
        ready = [_ready(self.vae, tile) for tile in tiles]
        self.cache = [_moved(kept, self.vae.device) for kept in self.cache]
        for tile in ready:
            found = network.decoder(network.conv2(tile), feat_cache=self.cache, feat_idx=[0])
            frames += found if isinstance(found, list) else [found]
        self.cache = [_moved(kept, "cpu") for kept in self.cache]
        return _pixels(self.vae, torch.cat(frames, dim=2))


class MagiDecoder(TileDecoder):
    """MAGI-1's VAE, whose tiles of 3 latent frames stand alone."""

    def __init__(self, vae):
        module = vae.first_stage_model.vae
        tile = module.tile_frames // module.config.patch_length
        super().__init__(vae, tile, tile)

    def decode(self, tiles: list[Tensor]) -> Tensor:
        return _images(self.vae.decode(torch.cat(tiles, dim=2)))


class OverlapDecoder(StreamDecoder):
    """Any other video VAE: the last frames before a chunk are decoded once more with it, and thrown away."""

    def __init__(self, vae):
        super().__init__(vae)
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
