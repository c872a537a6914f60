"""A VAE of the host, latents of one video in, chunk after chunk, as if they were decoded in one go."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import torch
from torch import Tensor

from ...flowcache_core.demo.vae import Memory, WanVAE
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.offload import runs_out_of_memory
from ...flowcache_core.history.streams import AT_ONCE, Pending, SideStream
from .magi_model import VaeForHost

try:
    from comfy.taesd.taehv import TAEHV, MemBlock
except ImportError:  # ComfyUI 0.3.64 has no small decoder for videos
    TAEHV = MemBlock = None

OVERLAP = 4  # latent frames that are decoded again before a chunk, where a VAE cannot be carried on
SMALLEST, BORDER = 16, 4  # latent pixels of a tile in space at least, and half of what two tiles share
Place = tuple[slice, slice]  # rows and columns of a latent


def stream_decoder(vae, make_room: Callable[[], bool] = lambda: False) -> "StreamDecoder":
    """What decodes that VAE's latents.

    Args:
        make_room: called where the device runs out of memory; says whether there is more now.

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
    if TAEHV is not None and isinstance(module, TAEHV):
        return SmallDecoder(vae)
    if isinstance(module, comfy.ldm.wan.vae.WanVAE):
        return WanDecoder(vae, make_room)
    return DeepDecoder(vae, make_room) if isinstance(module, comfy.ldm.wan.vae2_2.WanVAE) else OverlapDecoder(vae)


class StreamDecoder(ABC):
    """Call it with a latent [1, C, T, H, W], then `finish` it.

    Each gives frames [T, H, W, 3] in [0, 1] on the CPU, or none; some may wait for the next call.
    """

    def __init__(self, vae):
        self.vae = vae

    @abstractmethod
    def __call__(self, latent: Tensor, side: SideStream = AT_ONCE) -> Pending[Tensor] | None:
        """Decodes the next frames. On a side stream nothing waits for them: neither the CPU nor the network."""

    def finish(self) -> Pending[Tensor] | None:
        """Decodes what still waits."""
        return None


class DemoDecoder(StreamDecoder):
    """The demo's VAE, which takes a memory along."""

    def __init__(self, vae):
        super().__init__(vae)
        self.memory = Memory()

    def __call__(self, latent: Tensor, side: SideStream = AT_ONCE) -> Pending[Tensor]:
        return _pixels(self.vae, self.vae.first_stage_model.decode(_ready(self.vae, latent), self.memory), side)


class SmallDecoder(StreamDecoder):
    """ComfyUI's small decoders for previews and quick streams (TAE), whose blocks take the frame before along."""

    def __init__(self, vae):
        super().__init__(vae)
        self.past: dict[int, Tensor] = {}  # by place of the block: its last input, [1, C, H, W]

    def __call__(self, latent: Tensor, side: SideStream = AT_ONCE) -> Pending[Tensor] | None:
        network = self.vae.first_stage_model
        x = network.process_in(_ready(self.vae, latent)).movedim(2, 1)[0]  # [T, C, H, W]
        trimmed = 0 if self.past else network.frames_to_trim
        for place, block in enumerate(network.decoder):
            if not isinstance(block, MemBlock):
                x = block(x)
                continue
            before = self.past.get(place, torch.zeros_like(x[:1]))
            self.past[place] = x[-1:].clone()
            x = block(x, torch.cat([before, x[:-1]]))
        if network.patch_size > 1:
            x = torch.nn.functional.pixel_shuffle(x, network.patch_size)
        return _pixels(self.vae, x[trimmed:].movedim(0, 1)[None], side)


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
    def decode(self, tiles: list[Tensor], side: SideStream) -> Pending[Tensor]:
        """Decodes tiles that follow one another."""

    def __call__(self, latent: Tensor, side: SideStream = AT_ONCE) -> Pending[Tensor] | None:
        waiting = latent if self.waiting is None else torch.cat([self.waiting, latent], dim=2)
        tiles = []
        while waiting.shape[2] >= self.next:
            tiles.append(waiting[:, :, : self.next])
            waiting, self.next = waiting[:, :, self.next :], self.tile
        self.waiting = waiting
        return self.decode(tiles, side) if tiles else None

    def finish(self) -> Pending[Tensor] | None:
        return None if self.waiting is None or not self.waiting.shape[2] else self.decode([self.waiting], AT_ONCE)


class WanDecoder(TileDecoder):
    """The host's Wan VAE, which decodes the first frame alone and then pairs; older hosts: one by one.

    What its layers keep of the frames before is on the CPU between calls. Where the device runs out of memory, it makes
    room, and then goes on in tiles in space, each with its part of what was kept.
    """

    def __init__(self, vae, make_room: Callable[[], bool] = lambda: False):
        tile, count = self.stream_sizes(vae.first_stage_model.decoder)
        super().__init__(vae, 1, tile)
        self.make_room = make_room
        self.places: list[Place] = []  # of the tiles in space; none while the picture is decoded whole
        self.caches: list[list] = [[None] * count]  # of each tile

    def stream_sizes(self, decoder) -> tuple[int, int]:
        """Latent frames of a tile after the first, and how many of the network's layers keep something."""
        module = comfy.ldm.wan.vae
        if hasattr(module, "count_cache_layers"):
            return 2, module.count_cache_layers(decoder)
        return 1, module.count_conv3d(decoder)

    def pixels(self, network, tile: Tensor, cache: list) -> list[Tensor]:
        """Frames [1, 3, T, H, W] of a tile, in one part or several; the layers' memory is changed in place."""
        made = network.decoder(network.conv2(tile), feat_cache=cache, feat_idx=[0])
        return made if isinstance(made, list) else [made]

    def decode(self, tiles: list[Tensor], side: SideStream) -> Pending[Tensor]:
        found: list[Tensor] = []
        while runs_out_of_memory(lambda: found.append(self._decoded(tiles, side))):
            if not self.make_room() and not self._cut_smaller(tiles[0]):
                found.append(self._decoded(tiles, side))  # the device's own error
        return _pixels(self.vae, found[0], side)

    def _decoded(self, tiles: list[Tensor], side: SideStream) -> Tensor:
        """Decodes tiles in time, one place in space after the other. What is kept changes when all of it is done."""
        if not self.places:
            frames, cache = self._of_place(tiles, self.caches[0], side)
            self.caches = [cache]
            return frames
        caches, whole, weights = [], None, None
        for (rows, columns), cache in zip(self.places, self.caches, strict=True):
            frames, kept = self._of_place([tile[..., rows, columns] for tile in tiles], cache, side)
            caches.append(kept)
            scale = frames.shape[-1] // (columns.stop - columns.start)
            if whole is None or weights is None:
                size = (*frames.shape[:3], *(scale * side for side in tiles[0].shape[-2:]))
                whole, weights = torch.zeros(size), torch.zeros(size[-2:])
            down, across = (slice(scale * side.start, scale * side.stop) for side in (rows, columns))
            weight = _faded(frames.shape[-2], scale * BORDER)[:, None] * _faded(frames.shape[-1], scale * BORDER)
            whole[..., down, across] += frames.cpu().float() * weight
            weights[down, across] += weight
        assert whole is not None and weights is not None
        self.caches = caches
        return whole / weights

    def _of_place(self, tiles: list[Tensor], cache: list, side: SideStream) -> tuple[Tensor, list]:
        """Decodes one place; gives its frames, and what its layers keep, on the CPU."""
        network, frames = self.vae.first_stage_model, list[Tensor]()
        ready = [_ready(self.vae, tile) for tile in tiles]
        cache = [_brought_back(kept, self.vae.device) for kept in cache]
        for tile in ready:
            frames += self.pixels(network, tile, cache)
        return torch.cat(frames, dim=2), [side.to_cpu(kept) if isinstance(kept, Tensor) else kept for kept in cache]

    def _cut_smaller(self, latent: Tensor) -> bool:
        """Cuts every place in two, and what was kept of it; False where they are as small as can be."""
        places = self.places or [(slice(0, latent.shape[-2]), slice(0, latent.shape[-1]))]
        if max(side.stop - side.start for side in places[0]) < 2 * SMALLEST:
            return False
        halves = [
            (half, place, cache) for place, cache in zip(places, self.caches, strict=True) for half in _halves(place)
        ]
        self.caches = [[_part(kept, half, place) for kept in cache] for half, place, cache in halves]
        self.places = [half for half, _, _ in halves]
        return True


class DeepDecoder(WanDecoder):
    """The host's Wan 2.2 VAE of 48 channels, which decodes one frame after the other."""

    def stream_sizes(self, decoder) -> tuple[int, int]:
        return 1, comfy.ldm.wan.vae2_2.count_conv3d(decoder)

    def pixels(self, network, tile: Tensor, cache: list) -> list[Tensor]:
        first = all(kept is None for kept in cache)
        made = network.decoder(network.conv2(tile), feat_cache=cache, feat_idx=[0], first_chunk=first)
        return [comfy.ldm.wan.vae2_2.unpatchify(made, patch_size=2)]


def _halves(place: Place) -> list[Place]:
    """Cuts a place across its longer side; the halves share a border."""
    rows, columns = place
    along = rows if rows.stop - rows.start >= columns.stop - columns.start else columns
    middle = (along.start + along.stop) // 2
    parts = slice(along.start, middle + BORDER), slice(middle - BORDER, along.stop)
    return [(part, columns) if along is rows else (rows, part) for part in parts]


def _part(kept, half: Place, place: Place):
    """What a layer keeps of a half of a place; [..., h, w] at its own scale."""
    if not isinstance(kept, Pending):
        return kept
    pixels, cuts = kept.on_cpu(), list[slice]()
    for side, whole, size in zip(half, place, pixels.shape[-2:], strict=True):
        scale = size // (whole.stop - whole.start)
        cuts.append(slice(scale * (side.start - whole.start), scale * (side.stop - whole.start)))
    down, across = cuts
    return Pending(pixels[..., down, across].clone())


def _faded(size: int, border: int) -> Tensor:
    """Weights [size] that rise over a border from either end."""
    place = torch.arange(1, size + 1)
    return torch.minimum(torch.minimum(place, place.flip(0)) / (2 * border), torch.ones(()))


class MagiDecoder(TileDecoder):
    """MAGI-1's VAE, whose tiles of 3 latent frames stand alone."""

    def __init__(self, vae):
        module = vae.first_stage_model.vae
        tile = module.tile_frames // module.config.patch_length
        super().__init__(vae, tile, tile)

    def decode(self, tiles: list[Tensor], side: SideStream) -> Pending[Tensor]:
        return Pending(_images(self.vae.decode(torch.cat(tiles, dim=2))))


class OverlapDecoder(StreamDecoder):
    """Any other video VAE: the last frames before a chunk are decoded once more with it, and thrown away."""

    def __init__(self, vae):
        super().__init__(vae)
        self.before: Tensor | None = None

    def __call__(self, latent: Tensor, side: SideStream = AT_ONCE) -> Pending[Tensor]:
        whole = latent if self.before is None else torch.cat([self.before, latent], dim=2)
        known = 0 if self.before is None else self._count(self.before.shape[2])
        self.before = whole[:, :, -OVERLAP:]
        return Pending(_images(self.vae.decode(whole))[known:])

    def _count(self, frames: int) -> int:
        """Pixel frames of so many latent frames."""
        ratio = self.vae.upscale_ratio[0] if isinstance(self.vae.upscale_ratio, tuple) else 1
        return ratio(frames) if callable(ratio) else frames * ratio


def _ready(vae, latent: Tensor) -> Tensor:
    """Brings the VAE to its device, and the latent with it."""
    memory = vae.memory_used_decode(latent.shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
    return latent.to(vae.device, vae.vae_dtype)


def _pixels(vae, decoded: Tensor, side: SideStream) -> Pending[Tensor]:
    return side.to_cpu(_images(vae.process_output(decoded.float()).movedim(1, -1)))


def _images(decoded: Tensor) -> Tensor:
    """Frames [T, H, W, 3] of one video [1, T, H, W, 3]."""
    return decoded[0] if decoded.ndim == 5 else decoded


def _brought_back(kept, device):
    """What a layer kept, on the device, and what is no tensor as it is."""
    return kept.on_device().to(device, non_blocking=True) if isinstance(kept, Pending) else kept
