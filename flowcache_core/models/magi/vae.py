"""MAGI-1's autoencoder: a transformer over patches of 4 frames x 8 x 8 pixels, encoder and decoder alike.

Videos go through it in tiles, as upstream does always: 256 x 256 pixels with a quarter of overlap that is cross-faded,
and 12 frames without overlap. Each tile stands alone; its places are found by interpolating a learned table.

Source: MAGI-1, inference/model/vae (vae_model.py, vae_module.py) and inference/infra/parallelism/tile_parallel.py.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..fit import fit

LATENT_SCALE = 0.18215  # the network sees the autoencoder's latent times this
OVERLAP = 0.25  # of a tile's side

# Of each size: its name in upstream's config.json, what upstream takes where it is not there, and a bound beyond what
# any autoencoder has; a file from a stranger may ask for any.
SIZES = {
    "width": ("embed_dim", 768, 1 << 14),
    "depth": ("depth", 12, 256),
    "heads": ("num_heads", 12, 256),
    "mlp_ratio": ("mlp_ratio", 4.0, 64),
    "latent_channels": ("z_chans", 4, 1024),
    "size": ("video_size", 256, 4096),
    "length": ("video_length", 16, 4096),
    "patch": ("patch_size", 8, 256),
    "patch_length": ("patch_length", 4, 256),
}


@dataclass(frozen=True)
class MagiVaeConfig:
    """Sizes of the autoencoder; the number of heads cannot be told from the weights, so it comes from a config.json.

    Attributes:
        width, depth, heads, mlp_ratio: of the transformers.
        latent_channels: of the latent.
        size, length: pixels of a side and frames that the table of places was made for.
        patch, patch_length: pixels of a side and frames of a patch.
        qkv_bias: queries, keys and values have a bias.
        norm_in_heads: queries, keys and values are normalised head by head, instead of the attention's input.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    latent_channels: int
    size: int
    length: int
    patch: int
    patch_length: int
    qkv_bias: bool
    norm_in_heads: bool

    @classmethod
    def from_upstream(cls, settings: Mapping[str, Any]) -> "MagiVaeConfig":
        """Reads the contents of the autoencoder folder's config.json.

        Raises:
            UserError: another class of autoencoder, or a layout that upstream cannot run either.
        """
        kind, sizes = settings.get("_class_name"), settings.get("ddconfig")
        if kind != "ViTVAE" or not isinstance(sizes, Mapping) or settings.get("model_type", "vit") != "vit":
            raise UserError(f"The config.json is of a '{kind}', expected MAGI-1's ViTVAE: choose its vae folder.")
        fixed = {
            "double_z": True,
            "with_cls_token": True,
            "conv_last_layer": True,
            "norm_code": False,
            "use_rope": False,
            "use_final_proj": False,
            "in_chans": 3,
        }
        for name, expected in fixed.items():
            if (value := sizes.get(name, expected)) != expected:
                raise UserError(f"The autoencoder's config.json has {name} = {value}; only {expected} is supported.")
        found = {name: sizes.get(theirs, usual) for name, (theirs, usual, _) in SIZES.items()}
        for name, value in found.items():
            theirs, _, largest = SIZES[name]
            numbers = (int, float) if name == "mlp_ratio" else (int,)
            if type(value) not in numbers or not 0 < value <= largest:
                raise UserError(f"The autoencoder's config.json has {theirs} = {value!r:.40}, expected 1 to {largest}.")
        config = cls(**found, qkv_bias=sizes.get("qkv_bias", False), norm_in_heads=sizes.get("ln_in_attn", False))
        if config.width % config.heads:
            raise UserError(f"The autoencoder's config.json has {config.heads} heads for a width of {config.width}.")
        return config


def head_norm(x: Tensor) -> Tensor:
    """Brings the last axis to mean 0 and deviation 1; unlike in a layer norm, eps is added to the deviation."""
    return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True, unbiased=False) + 1e-5)


class VaeAttention(nn.Module):
    def __init__(self, config: MagiVaeConfig):
        super().__init__()
        self.heads = config.heads
        self.norm_in_heads = config.norm_in_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, tokens, D]
        q, k, v = head_norm(qkv) if self.norm_in_heads else qkv
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VaeBlock(nn.Module):
    def __init__(self, config: MagiVaeConfig):
        super().__init__()
        self.norm1 = nn.Identity() if config.norm_in_heads else nn.LayerNorm(config.width)
        self.attn = VaeAttention(config)
        self.norm2 = nn.LayerNorm(config.width)
        inner = int(config.width * config.mlp_ratio)
        feed_forward = {"fc1": nn.Linear(config.width, inner), "gelu": nn.GELU(), "fc2": nn.Linear(inner, config.width)}
        self.mlp = nn.Sequential(OrderedDict(feed_forward))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VaeTransformer(nn.Module):
    """What encoder and decoder share: places, an extra first token, blocks, norm."""

    def __init__(self, config: MagiVaeConfig):
        super().__init__()
        side = config.size // config.patch
        self.places = (config.length // config.patch_length, side, side)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.places[0] * side * side, config.width))
        self.blocks = nn.ModuleList(VaeBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def transform(self, patches: Tensor) -> Tensor:
        """Runs embedded patches [B, T, h, w, width] through the blocks; same shape."""
        table = self.pos_embed[:, 1:].unflatten(1, self.places).movedim(-1, 1)
        places = F.interpolate(table.float(), size=patches.shape[1:4], mode="trilinear").movedim(1, -1).to(patches)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
        x = torch.cat([first, (patches + places).flatten(1, 3)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:].unflatten(1, patches.shape[1:4])


class VaePatches(nn.Module):
    def __init__(self, config: MagiVaeConfig):
        super().__init__()
        self.size = (config.patch_length, config.patch, config.patch)
        self.proj = nn.Conv3d(3, config.width, self.size, self.size)

    def forward(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] to [B, F / 4, H / 8, W / 8, width]; what is left over at the ends is dropped.

        Written as a product: torch's convolution in bfloat16 on a CPU returns garbage where the result is one wide.
        """
        length, side, _ = self.size
        frames, rows, columns = (count // size for count, size in zip(video.shape[2:], self.size, strict=True))
        x = video[:, :, : frames * length, : rows * side, : columns * side]
        x = x.unflatten(4, (columns, side)).unflatten(3, (rows, side)).unflatten(2, (frames, length))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, F / 4, H / 8, W / 8, 3 * 4 * 8 * 8]
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class VaeEncoder(VaeTransformer):
    def __init__(self, config: MagiVaeConfig):
        super().__init__(config)
        self.patch_embed = VaePatches(config)
        self.last_layer = nn.Linear(config.width, 2 * config.latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] to mean and log-variance [B, 2 * C, F / 4, H / 8, W / 8]."""
        x = self.transform(self.patch_embed(video))
        return self.last_layer(x).movedim(-1, 1)


class VaeDecoder(VaeTransformer):
    def __init__(self, config: MagiVaeConfig):
        super().__init__(config)
        self.patch = (config.patch_length, config.patch, config.patch)
        self.proj_in = nn.Linear(config.latent_channels, config.width)
        self.last_layer = nn.Conv3d(config.width // (config.patch_length * config.patch**2), 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Decodes a latent [B, C, T, h, w] to pixels [B, 3, 4 T, 8 h, 8 w]."""
        x = self.transform(self.proj_in(latent.movedim(1, -1))).unflatten(-1, (*self.patch, -1))
        # [B, T, h, w, 4, 8, 8, C] -> [B, C, T, 4, h, 8, w, 8]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return self.last_layer(x)


class MagiVae(nn.Module):
    """The autoencoder, under upstream's names.

    Args:
        config: sizes.
        tile: pixels of a tile's side; upstream's is 256.
        tile_frames: pixel frames of a tile; upstream's is half a second, 12.
    """

    def __init__(self, config: MagiVaeConfig, tile: int = 256, tile_frames: int = 12):
        super().__init__()
        self.config = config
        self.tile_frames = tile_frames
        self.tile = tile
        self.latent_tile = (tile_frames // config.patch_length, tile // config.patch)
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Gives the posterior's mean, not yet times `LATENT_SCALE`.

        Args:
            video: [B, 3, F, H, W] from -1 to 1. One frame gives one latent frame.

        Returns:
            [B, C, F / 4, H / 8, W / 8]; one to three left-over frames of a tile are dropped, as upstream does.

        Raises:
            UserError: the sides are not multiples of 8, or the last tile would have two or three frames.
        """
        frames, height, width = video.shape[2:]
        patch, length = self.config.patch, self.config.patch_length
        rest = frames % self.tile_frames
        if height % patch or width % patch or 1 < rest < length:
            raise UserError(
                f"The video has {frames} frames of {height} x {width}; MAGI-1 encodes multiples of {patch} pixels, and "
                f"frames that leave none, 1, or at least {length} after tiles of {self.tile_frames}: cut it to fit."
            )
        return self._tiled(self._encode_tile, video, (self.tile_frames, self.tile), self.latent_tile, settle=True)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Pixels [B, 3, 4 T, 8 h, 8 w], about -1 to 1, of a latent [B, C, T, h, w] that was divided by `LATENT_SCALE`.

        A latent of one frame gives one pixel frame. Unlike upstream, a single latent frame left over at the end of a
        longer video still gives four.
        """
        frames, side = self.latent_tile
        made = (frames * self.config.patch_length, side * self.config.patch)
        video = self._tiled(self.decoder, latent, self.latent_tile, made, settle=False)
        return video[:, :, :1] if latent.shape[2] == 1 else video

    def _encode_tile(self, video: Tensor) -> Tensor:
        single = video.shape[2] == 1
        video = video.expand(-1, -1, self.config.patch_length, -1, -1) if single else video
        return self.encoder(video)[:, : self.config.latent_channels]

    def _tiled(
        self, run: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int], made: tuple[int, int], settle: bool
    ) -> Tensor:
        """Runs tiles of x [B, C, T, H, W] and joins them, cross-faded over a quarter of their sides.

        Args:
            tile, made: frames and side of a tile of x, and of what is made of it.
            settle: a tile is faded against its neighbours' faded, not their own, values; upstream encodes so.
        """
        frames, side = tile
        step, fade = int(side * (1 - OVERLAP)), int(made[1] * OVERLAP)
        keep_frames, keep = made[0], made[1] - fade
        stretches = []
        for stretch in x.split(frames, dim=2):
            above: list[Tensor] = []
            rows = []
            for top in range(0, x.shape[3], step):
                beside: list[Tensor] = []
                row = []
                for left in range(0, x.shape[4], step):
                    own = run(stretch[..., top : top + side, left : left + side])
                    faded = own.clone()
                    if above:
                        cross_fade(above[len(beside)], faded, fade, dim=3)
                    if beside:
                        cross_fade(beside[-1], faded, fade, dim=4)
                    row.append(faded[:, :, :keep_frames, :keep, :keep])
                    beside.append(faded if settle else own)
                above = beside
                rows.append(torch.cat(row, dim=4))
            stretches.append(torch.cat(rows, dim=3))
        return torch.cat(stretches, dim=2)


def load_vae(tensors: Mapping[str, Tensor], config: MagiVaeConfig) -> MagiVae:
    """Makes the autoencoder over a checkpoint's tensors under upstream's names, neither copied nor converted.

    Raises:
        UserError: tensors are missing, left over or of the wrong shape.
    """
    with torch.device("meta"):
        vae = MagiVae(config)
    return fit(vae, tensors, "MAGI-1 autoencoder with its own config.json")


def cross_fade(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fades the end of `before` into the beginning of `after`, in place."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    ramp = (torch.arange(extent, device=after.device) / extent).to(after.dtype)
    ramp = ramp.reshape([-1 if axis == dim else 1 for axis in range(5)])
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start = after.narrow(dim, 0, extent)
    start.copy_(end * (1 - ramp) + start * ramp)
