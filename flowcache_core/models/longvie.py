"""LongVie 2: Wan 2.1 image to video, led by a dense video (depth) and a sparse one (tracks of points).

The network is Wan 2.1's, with 36 channels in and an image encoder's features beside the text, and a second, narrower
stack for each of the two videos: blocks of half width that run beside the first layers and add to the tokens there. A
chunk is 81 frames of pixels; each after the first begins with the last picture of the one before, and has its last
eight pictures in front, encoded again.

Source: Vchitect/LongVie, diffsynth/models/wan_video_dit_dual_control.py, diffsynth/pipelines/wan_video_new_longvie.py,
inference.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.pictures import Scene
from ..errors import UserError
from ..history.cache import Attention
from ..history.plan import NetworkSizes
from .wan import FRAME_STRIDE, Context, WanBackbone, WanBlock, WanConfig, WanNetwork, split_heads

CHUNK_FRAMES = 21  # latent frames: 81 of pixels
HISTORY_PICTURES = 8  # of the chunk before, whose first and next four become two latent frames; the last three drop out
HISTORY_FRAMES = 1 + (HISTORY_PICTURES - 1) // FRAME_STRIDE  # latent frames that they become
STREAMS = ("dense", "sparse")
CONTROL = "control_"  # begins the names of all that LongVie adds to the network


@dataclass(frozen=True)
class LongVieConfig(WanConfig):
    """Sizes of a network of LongVie's.

    Attributes:
        control_layers: of the first layers have control blocks beside them.
        image_dim: width of the image encoder's features.
    """

    in_dim: int = 36
    control_layers: int = 12
    image_dim: int = 1280

    @property
    def half(self) -> WanConfig:
        """Sizes of a control block."""
        return replace(self, dim=self.dim // 2, num_heads=self.num_heads // 2, ffn_dim=self.ffn_dim // 2)

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return led_sizes(super().sizes, self.control_layers)

    def network(self) -> "LongVieNetwork":
        """Makes a network of these sizes."""
        return LongVieNetwork(self)


def led_sizes(plain: NetworkSizes, control_layers: int) -> NetworkSizes:
    """Adds to a network's sizes what its control streams take, which are as wide together as its tokens."""
    more = 2 * control_layers * plain.dim
    return replace(plain, inside=plain.inside + plain.dim, text_width=plain.text_width + more)


class ImageEmbedding(nn.Module):
    """Brings an image encoder's features to the network's width."""

    def __init__(self, config: LongVieConfig):
        super().__init__()
        width = config.image_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class LongVieBlock(WanBlock):
    """A block that reads an image beside the text."""

    def __init__(self, config: WanConfig, layers: Any = nn):
        super().__init__(config, layers)
        self.cross_attn.k_img = layers.Linear(config.dim, config.dim)
        self.cross_attn.v_img = layers.Linear(config.dim, config.dim)
        self.cross_attn.norm_k_img = layers.RMSNorm(config.dim, eps=config.eps)


class LongVieNetwork(WanNetwork):
    """The parameters of a LongVie 2 network, under the names of Wan 2.1 and of LongVie's control file."""

    def __init__(self, config: LongVieConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(LongVieBlock(config) for _ in range(config.num_layers))
        self.img_emb = ImageEmbedding(config)
        add_control_layers(self, config)


def add_control_layers(network: nn.Module, config: LongVieConfig, layers: Any = nn) -> None:
    """Gives a network the modules that LongVie adds to it.

    Args:
        network: gets them as attributes that begin with `CONTROL`.
        layers: whose Linear, LayerNorm and RMSNorm to use; a host's own, so that its weight casting works.
    """
    half, count = config.dim // 2, config.control_layers
    for name in STREAMS:
        blocks = nn.ModuleList(LongVieBlock(config.half, layers) for _ in range(count))
        setattr(network, f"control_blocks_{name}", blocks)
        setattr(network, f"control_initial_combine_linear_{name}", layers.Linear(config.dim, half))
    network.control_text_linear = layers.Linear(config.dim, half)
    network.control_t_mod = layers.Linear(config.dim, half)
    network.control_combine_linears = nn.ModuleList(layers.Linear(half, config.dim) for _ in range(count))


def fit_control_layers(
    network: nn.Module, config: LongVieConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, layers: Any
) -> None:
    """Gives a host's network the control layers of a checkpoint.

    Args:
        weights: the checkpoint's; those that begin with `CONTROL` are taken.
        dtype: that they are kept in.
        layers: as for `add_control_layers`.
    """
    with torch.device("meta"):
        beside = nn.Module()
        add_control_layers(beside, config, layers)
    own = {name: weight.to(dtype) for name, weight in weights.items() if name.startswith(CONTROL)}
    beside.load_state_dict(own, assign=True)
    for name, module in beside.requires_grad_(False).eval().named_children():
        setattr(network, name, module)


def leads(network: Any) -> bool:
    """Whether a network has LongVie's control layers."""
    return hasattr(network, "control_combine_linears")


class LedContext(Context):
    """A text's keys and values for the network's own layers, and those for the control blocks.

    Attributes:
        streams: of each control stream.
    """

    streams: tuple[Context, ...] = ()


class Shown(NamedTuple):
    """A scene as the network takes it, of one row.

    Attributes:
        scene: that it was made of.
        like: type and device that it was made for.
        attend: of a chunk's frames among themselves.
        channels: that stand behind the latent's, [1, C, T, H, W].
        history: tokens before the chunk's own, [1, frames, S, dim], or None.
        streams: tokens that each control stream begins with, [1, T, S, dim / 2].
        image: keys and values of the picture, a pair a layer; `control_images`: of each stream's blocks.
    """

    scene: Scene
    like: tuple[torch.dtype, torch.device]
    attend: Attention
    channels: Tensor
    history: Tensor | None
    streams: tuple[Tensor, ...]
    image: list[tuple[Tensor, Tensor]]
    control_images: tuple[list[tuple[Tensor, Tensor]], ...]


class Led:
    """The control streams of a forward on their way through the layers.

    Attributes:
        tokens: of each stream, [rows, T, S, dim / 2].
        modulation: of their blocks, [rows, 1, 6, dim / 2].
    """

    def __init__(self, tokens: Sequence[Tensor], modulation: Tensor):
        self.tokens, self.modulation = list(tokens), modulation


class LedConditioning(NamedTuple):
    """`Conditioning` of a chunk that control streams lead."""

    modulation: Tensor
    texts: Sequence[Sequence[LedContext]]
    led: Led


class LongVieBackbone(WanBackbone):
    """Runs chunks through a LongVie 2 network: first `show` it a scene, then as `WanBackbone`, a chunk at a time.

    Args:
        network: a `LongVieNetwork`, or the host's Wan image to video with `add_control_layers`.
        attention: used for what is read of text and picture.
    """

    shown: Shown | None = None

    @property
    def control_layers(self) -> int:
        return len(self.network.control_combine_linears)

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return led_sizes(super().sizes, self.control_layers)

    def show(self, scene: Scene, x: Tensor, attend: Attention) -> None:
        """Prepares what all steps of a chunk have in common.

        Args:
            scene: of the chunk.
            x: a latent of the type and on the device that is computed with.
            attend: attention of the chunk's frames among themselves.
        """
        if self.shown is not None and self.shown.scene is scene and self.shown.like == (x.dtype, x.device):
            return
        self.shown = None  # what was made for the chunk before makes room
        image, features = scene.image.to(x), scene.features.to(x)
        controls = [super(LongVieBackbone, self).embed(video.to(x)) for video in scene.controls]
        history = None
        if scene.history is not None:
            known = scene.history.to(x)
            marked = known.new_ones(()).expand(known.shape[0], image.shape[1], *known.shape[2:])
            history = super().embed(torch.cat([marked, known], dim=1))
        picture = self.network.img_emb(features)
        control_picture = self.network.control_text_linear(picture)
        self.shown = Shown(
            scene,
            (x.dtype, x.device),
            attend,
            image,
            history,
            tuple(self._stream(f"initial_combine_linear_{name}")(v) for name, v in zip(STREAMS, controls, strict=True)),
            _image_keys(self.network.blocks, picture, self.heads),
            tuple(_image_keys(self._stream(f"blocks_{name}"), control_picture, self.heads // 2) for name in STREAMS),
        )

    def _stream(self, name: str) -> Any:
        return getattr(self.network, f"{CONTROL}{name}")

    def context(self, text: Tensor) -> LedContext:
        """Makes keys and values of a text embedding [B, tokens, text_dim], those of the control blocks too."""
        context = LedContext(super().context(text), text)
        told = self.network.control_text_linear(self.network.text_embedding(text))
        context.streams = tuple(
            Context((_keys(block.cross_attn, told, self.heads // 2) for block in self._stream(f"blocks_{name}")), text)
            for name in STREAMS
        )
        return context

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence[Sequence[Any]]) -> Any:
        """Prepares what the blocks are told; its streams can be run through the layers once."""
        told = super().conditioning(x, sigma, texts)
        begun = [tokens.expand(x.shape[0], -1, -1, -1) for tokens in self._scene.streams]
        return LedConditioning(told.modulation, texts, Led(begun, self.network.control_t_mod(told.modulation)))

    @property
    def _scene(self) -> Shown:
        if self.shown is None:
            raise UserError("The network has been shown no scene; show it one before its first forward.")
        return self.shown

    def embed(self, x: Tensor) -> Tensor:
        """Makes tokens [B, frames, S, dim] of a latent [B, C, T, H, W]: those of the history, then its own."""
        own, history = self._own(x), self._scene.history
        return own if history is None else torch.cat([history.expand(x.shape[0], -1, -1, -1), own], dim=1)

    def _own(self, x: Tensor) -> Tensor:
        channels = self._scene.channels
        if channels.shape[2:] != x.shape[2:]:
            raise UserError(
                f"The scene's image has {list(channels.shape[2:])} frames, rows and columns, the chunk "
                f"{list(x.shape[2:])}; give pictures of the video's size and length."
            )
        return super().embed(torch.cat([x, channels.expand(x.shape[0], -1, -1, -1, -1)], dim=1))

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Takes the blocks' input from their output, of the chunk's own tokens."""
        return self.exact(hidden[:, -x.shape[2] :]) - self.exact(self._own(x))

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the velocity [B, C, T, H, W] from the latent, its noise level and a residual."""
        return self.velocity(x, self.patches_of(x, sigma, self._own(x) + residual))

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches: the patch embedding of the chunk's own tokens."""
        return self._own(x)

    def block(self, layer: int, x: Tensor, conditioning: Any, attend: Attention) -> Tensor:
        """Runs one block, and the control blocks beside it, whose sum is added to the chunk's own tokens."""
        x = super().block(layer, x, conditioning, attend)
        if layer >= self.control_layers:
            return x
        led, shown = conditioning.led, self._scene
        for number, name in enumerate(STREAMS):
            streams = [[context.streams[number] for context in chunk] for chunk in conditioning.texts]
            read = partial(self._read_beside, layer, streams, shown.control_images[number])
            led.tokens[number] = self._through(
                self._stream(f"blocks_{name}")[layer], led.tokens[number], led.modulation, self.heads // 2,
                shown.attend, read,
            )  # fmt: skip
        dense, sparse = led.tokens
        added = self.network.control_combine_linears[layer]((dense + sparse).flatten(1, 2)).view(*dense.shape[:3], -1)
        x[:, -added.shape[1] :] += added  # the block made x for this
        return x

    def _read(self, layer: int, q: Tensor, texts: Sequence[Sequence[Context]]) -> Tensor:
        return self._read_beside(layer, texts, self._scene.image, q)

    def _read_beside(
        self, layer: int, texts: Sequence[Sequence[Context]], image: Sequence[tuple[Tensor, Tensor]], q: Tensor
    ) -> Tensor:
        """What text and picture give, each attended to alone."""
        keys, values = (part.expand(q.shape[0], -1, -1, -1) for part in image[layer])
        return super()._read(layer, q, texts) + self.attention(q, keys, values)


def _keys(cross: Any, text: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return split_heads(cross.norm_k(cross.k(text)), heads), split_heads(cross.v(text), heads)


def _image_keys(blocks: Any, picture: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, H, tokens, D] of a picture's features, a pair a layer."""
    crosses = [block.cross_attn for block in blocks]
    return [
        (split_heads(cross.norm_k_img(cross.k_img(picture)), heads), split_heads(cross.v_img(picture), heads))
        for cross in crosses
    ]


class Clips:
    """The scenes of a video, from pictures.

    Args:
        encode: pictures [frames, H, W, 3] in [0, 1] to latents [1, C, T, H / 8, W / 8] in the network's space.
        decode: a chunk's latent back to pictures.
        features: what the image encoder says of a picture [H, W, 3], [1, tokens, width].
        start: the picture that the video begins with, [H, W, 3].
        controls: dense and sparse video, [frames, H, W, 3], as many frames for each chunk as it has.

    Raises:
        UserError: when a chunk begins for which the videos are too short.

    Pictures go from chunk to chunk as they are decoded; upstream cuts them down to 8 bits, which darkens them a little
    each time.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor],
        start: Tensor,
        controls: Sequence[Tensor],
        chunk_frames: int = CHUNK_FRAMES,
    ):
        self.encode, self.decode, self.features = encode, decode, features
        self.start, self.controls = start, controls
        self.pictures = FRAME_STRIDE * (chunk_frames - 1) + 1  # of a chunk

    def __call__(self, chunk: int, before: Tensor | None) -> Scene:
        """Makes the scene of a chunk behind a finished one, [1, C, T, H, W]."""
        seen = None if before is None else self.decode(before)
        image = self.start if seen is None else seen[-1]
        frames = slice(chunk * self.pictures, (chunk + 1) * self.pictures)
        videos = [video[frames] for video in self.controls]
        for name, video, whole in zip(STREAMS, videos, self.controls, strict=True):
            if len(video) < self.pictures:
                raise UserError(
                    f"The {name} control video has {len(whole)} frames, and chunk {chunk} needs {frames.start} to "
                    f"{frames.stop}: {self.pictures} for each chunk."
                )
        return Scene(
            self._begun(image),
            self.features(image),
            tuple(torch.cat([self.encode(video), self._begun(video[0])], dim=1) for video in videos),
            None if seen is None else self.encode(seen[-HISTORY_PICTURES:]),
        )

    def _begun(self, picture: Tensor) -> Tensor:
        """A mark on the first frame, and latents of a video that begins with a picture and goes on in grey, [1, 4 + C,
        T, H / 8, W / 8]."""
        video = picture.new_full((self.pictures, *picture.shape), 0.5)
        video[0] = picture
        latent = self.encode(video)
        mark = torch.zeros_like(latent[:, :1]).repeat(1, FRAME_STRIDE, 1, 1, 1)
        mark[:, :, 0] = 1.0
        return torch.cat([mark, latent], dim=1)
