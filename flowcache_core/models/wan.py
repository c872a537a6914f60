"""Networks of the Wan 2.1 text-to-video layout: our own module, and how to run one chunk through any such network.

`WanNetwork` is the architecture and nothing else: parameters under Wan 2.1's names. `WanBackbone` runs the modules of
a network of that layout, ours or ComfyUI's WanModel and CausalWanModel, by calling them, never by reading their
weights, so the host's weight casting, LoRA, fp8 and GGUF layers work. Attention over the history is the caller's: the
backbone hands over plain (unrotated) queries, keys and values and gets the attended values back.

Source of the architecture: Wan 2.1, wan/modules/model.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..history.cache import Attention
from ..history.plan import NetworkSizes
from ..solvers.weights import joined_heads
from .rotary import Rotary

TEXT_TOKENS = 512
FRAME_STRIDE = 4  # pixel frames of a latent frame; a video's first one has 1, but for MAGI-1
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # the same behind a layer number, over the history


class Context(list[tuple[Tensor, Tensor]]):
    """A text's cross-attention keys and values [B, H, tokens, D], a pair a layer.

    Attributes:
        text: what they were made of, [B, tokens, text_dim].
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], text: Tensor):
        super().__init__(pairs)
        self.text = text


class Patches(Protocol):
    """What others have changed about a network's own modules, and wants those to be run as they are."""

    def block(
        self, layer: int, x: Tensor, conditioning: "Conditioning", attend: Attention, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Stands in for `WanBackbone.block`, which `plain` runs as it is."""

    def head(self, tokens: Tensor, embedding: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """Gives patches [B, T, S, patch height * patch width * C] of tokens [B, T, S, dim] and the time's embedding
        [B, T or 1, dim], as `plain` does."""


class Conditioning(NamedTuple):
    """What the blocks are told about the chunks that go through them together.

    Attributes:
        modulation: of the noise level, [rows, T or 1, 6, dim].
        texts: for each chunk the contexts of its branches.
    """

    modulation: Tensor
    texts: Sequence[Sequence[Context]]


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a network of the Wan 2.1 layout. Head width is dim / num_heads.

    Attributes:
        fps: has SkyReels-V2's frame-rate embedding.
        cross_attn_norm: tokens are normalised before they ask the text, as in every published network.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    fps: bool = False
    cross_attn_norm: bool = True

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return wan_sizes(self.num_layers, self.num_heads, self.dim, self.ffn_dim)

    def network(self) -> "WanNetwork":
        """Makes a network of these sizes."""
        return WanNetwork(self)


def wan_sizes(layers: int, heads: int, dim: int, inner_dim: int) -> NetworkSizes:
    """Says what decides how much memory a run takes; published models read 512 tokens of text.

    Inside a block the feed-forward needs most: its inner layer twice, tokens as they came, with the text, modulated,
    and one more where there are several branches.
    """
    inside = 2 * inner_dim + 4 * dim
    return NetworkSizes(layers, heads, heads, dim // heads, dim, inside, 2 * layers * dim, TEXT_TOKENS)


class WanAttention(nn.Module):
    def __init__(self, config: WanConfig, layers: Any = nn):
        super().__init__()
        self.q = layers.Linear(config.dim, config.dim)
        self.k = layers.Linear(config.dim, config.dim)
        self.v = layers.Linear(config.dim, config.dim)
        self.o = layers.Linear(config.dim, config.dim)
        self.norm_q = layers.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = layers.RMSNorm(config.dim, eps=config.eps)


class WanBlock(nn.Module):
    """A block; `layers` may be a host's own, so that its weight casting works."""

    def __init__(self, config: WanConfig, layers: Any = nn):
        super().__init__()
        dim, inner, eps = config.dim, config.ffn_dim, config.eps
        self.norm1 = layers.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = WanAttention(config, layers)
        self.norm3 = layers.LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = WanAttention(config, layers)
        self.norm2 = layers.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(layers.Linear(dim, inner), nn.GELU(approximate="tanh"), layers.Linear(inner, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)


class WanHead(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class CastingConv3d(nn.Conv3d):
    """Computes in the input's type, whatever its weights are stored in, as ComfyUI's does; latents enter in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class WanNetwork(nn.Module):
    """The parameters of a Wan 2.1 text-to-video network; `WanBackbone` runs it."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.freq_dim = config.freq_dim
        self.patch_size = config.patch_size
        self.out_dim = config.out_dim
        self.patch_embedding = CastingConv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.fps:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = WanHead(config)


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Makes float32 cosines, then sines, [..., width] of time-steps [...]."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales and shifts x [B, T, S, C] by [B, T or 1, 1, C]."""
    return torch.addcmul(shift, x, 1 + scale)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, heads * D] to [B, heads, tokens, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, tokens, D] to [B, tokens, heads * D]."""
    return x.transpose(1, 2).flatten(2)


# A block's parts, between which it attends: to the history, then to the text. They are functions of a block and of
# tensors alone, so that torch.compile makes one graph of each for all layers; and cut where the last one's input can be
# let go of.


def asks_history(block: Any, x: Tensor, shift: Tensor, scale: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [rows, T, S, dim] to what attends to the history: unrotated q, k, v [rows, heads, T * S, D]."""
    attn = block.self_attn
    y = modulate(block.norm1(x), shift, scale).flatten(1, 2)
    parts = attn.norm_q(attn.q(y)), attn.norm_k(attn.k(y)), attn.v(y)
    q, k, v = (split_heads(part, heads) for part in parts)
    return q, k, v


def asks_text(block: Any, x: Tensor, past: Tensor, gate: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Adds what the history gave, [rows, heads, T * S, D], to tokens; gives them and what they ask the text."""
    x = torch.addcmul(x, block.self_attn.o(join_heads(past)).view_as(x), gate)
    cross = block.cross_attn
    return x, split_heads(cross.norm_q(cross.q(block.norm3(x).flatten(1, 2))), heads)


def reads_text(block: Any, x: Tensor, text: Tensor) -> Tensor:
    """Adds what the text gave, [rows, heads, T * S, D], to tokens."""
    return x + block.cross_attn.o(join_heads(text)).view_as(x)


def feeds_forward(block: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """Adds the feed-forward to tokens."""
    y = block.ffn(modulate(block.norm2(x), shift, scale).flatten(1, 2))
    return torch.addcmul(x, y.view_as(x), gate)


class Compiled:
    """What backbones have in common whose blocks are run in parts.

    Attributes:
        parts: functions of a block and of tensors alone.
    """

    parts: tuple[Callable[..., Any], ...]

    def compile(self, **options) -> None:
        """Compiles the blocks, at the first chunk that goes through: one graph for each part of a block, for all layers
        and runs. Attention stays outside.

        Args:
            options: of `torch.compile`.
        """
        self.parts = tuple(torch.compile(part, **options) for part in self.parts)


class WanBackbone(Compiled):
    """Runs chunks through a network of the Wan 2.1 layout.

    Args:
        network: a `WanNetwork`, or the host's WanModel or CausalWanModel.
        attention: used for cross-attention here; the history uses its own.

    Attributes:
        patches: of a host's other nodes, or None. Chunks then go through a block one by one.
        whole: holds a layer's weights together while they are used, where several processes have a part of each.
    """

    patches: Patches | None = None

    def __init__(self, network: Any, attention: Attention = F.scaled_dot_product_attention):
        self.network = network
        self.attention = attention
        self.whole: Callable[[int], AbstractContextManager] = nullcontext
        self.layers = len(network.blocks)
        self.heads: int = network.num_heads
        # A normalised query is as wide as the model, whatever class the linear layers are of.
        self.dim: int = network.blocks[0].modulation.shape[-1]
        self.head_dim = self.dim // self.heads
        self.rotary = Rotary(self.head_dim)
        self.parts = (asks_history, asks_text, reads_text, feeds_forward)

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return wan_sizes(self.layers, self.heads, self.dim, self.network.blocks[0].ffn[0].out_features)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.network.out_dim

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return self.network.text_embedding[0].in_features

    @property
    def dtype(self) -> torch.dtype | None:
        """What texts must have; None where the network's layers cast."""
        first = self.network.text_embedding[0]
        return first.weight.dtype if type(first) is nn.Linear else None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of one frame of latent size height x width."""
        _, patch_height, patch_width = self.network.patch_size
        return -(-height // patch_height), -(-width // patch_width)

    def context(self, text: Tensor) -> Context:
        """Makes cross-attention keys and values of a text embedding [B, tokens, text_dim]: one pair a layer, [B, H,
        tokens, D]."""
        embedded = self.network.text_embedding(text)
        return Context((self._text_keys(layer, embedded) for layer in range(self.layers)), text)

    def _text_keys(self, layer: int, embedded: Tensor) -> tuple[Tensor, Tensor]:
        with self.whole(layer):
            cross = self.network.blocks[layer].cross_attn
            keys, values = cross.norm_k(cross.k(embedded)), cross.v(embedded)
            return split_heads(keys, self.heads), split_heads(values, self.heads)

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence[Sequence[Context]]) -> Conditioning:
        """Prepares what all blocks are told about one or more chunks.

        Args:
            x: latents of the chunks behind one another, [rows, C, T, H, W].
            sigma: noise level, [rows], or [rows, T] for one level a frame.
            texts: for each chunk the contexts of its branches; rows are branch after branch.
        """
        return Conditioning(self._time(sigma, x.dtype)[1], texts)

    def trunk(self, x: Tensor, sigma: Tensor, context: Context, attend: Attend) -> Tensor:
        """Runs the embedding and all blocks.

        Args:
            x: latent [B, C, T, H, W].
            sigma: noise level, [B], or [B, T] for one level a frame.
            context: what `context` gave, with B rows.
            attend: attention over the history; it gets unrotated q, k, v [B, H, tokens, D] of a layer.

        Returns:
            The blocks' output minus their input, [B, T, rows * columns, dim].
        """
        conditioning, hidden = self.conditioning(x, sigma, [[context]]), self.embed(x)
        for layer in range(self.layers):
            hidden = self.block(layer, hidden, conditioning, partial(attend, layer))
        return self.residual(x, hidden)

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Takes the blocks' input from their output; the input is embedded anew, so that it need not be kept."""
        return self.exact(hidden) - self.exact(self.embed(x))

    def exact(self, tokens: Tensor) -> Tensor:
        """Tokens in the precision that residuals are kept in."""
        return tokens

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the velocity [B, C, T, H, W] from the latent, its noise level and a residual that `trunk` gave."""
        return self.velocity(x, self.patches_of(x, sigma, self.embed(x) + residual))

    def patches_of(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Gives what each of the last layer's tokens [B, T, S, dim] says of the velocity, [B, T, S, patch height *
        patch width * C]; S may be a part of a frame's."""
        head = self.network.head
        embedding, _ = self._time(sigma, x.dtype)  # [B, T or 1, dim]
        shift, scale = (head.modulation.to(x) + embedding[:, :, None]).split(1, dim=2)

        def plain() -> Tensor:
            told = modulate(head.norm(tokens), shift, scale)
            return head.head(told.flatten(1, 2)).unflatten(1, told.shape[1:3])

        return plain() if self.patches is None else self.patches.head(tokens, embedding, plain)

    def velocity(self, x: Tensor, patches: Tensor) -> Tensor:
        """Puts the patches of all tokens of a latent's frames together to the velocity [B, C, T, H, W]."""
        height, width = x.shape[-2:]
        latent = unpatched(patches, self.grid(height, width), self.network.patch_size[1:])
        return latent[:, :, :, :height, :width]

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches: the patch embedding (MAGI-1's choice), [B, T, rows * columns, dim]."""
        return self.embed(x)

    def embed(self, x: Tensor) -> Tensor:
        """Makes tokens [B, T, rows * columns, dim] of a latent [B, C, T, H, W]."""
        _, _, _, height, width = x.shape
        rows, columns = self.grid(height, width)
        _, patch_height, patch_width = self.network.patch_size
        if (rows * patch_height, columns * patch_width) != (height, width):
            x = F.pad(x, (0, columns * patch_width - width, 0, rows * patch_height - height, 0, 0), mode="circular")
        layer = self.network.patch_embedding
        tokens = layer(x.to(layer.weight.dtype) if type(layer) is nn.Conv3d else x.float())  # all others cast
        # In order in memory, or every layer norm would copy it; the second call does that where the type stays.
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)
        return tokens.to(x.dtype, memory_format=torch.contiguous_format).contiguous()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Gives what the network is told of a noise level."""
        return 1000.0 * sigma

    def _time(self, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Noise level [B] or [B, T] to the time embedding [B, T or 1, dim] and its projection [B, T or 1, 6, dim]."""
        timestep = self.timestep(sigma).reshape(sigma.shape[0], -1)
        embedding = self.network.time_embedding(sinusoid(timestep, self.network.freq_dim).to(dtype))
        return embedding, self.network.time_projection(embedding).unflatten(-1, (6, self.dim))

    def block(self, layer: int, x: Tensor, conditioning: Conditioning, attend: Attention) -> Tensor:
        """Runs one block.

        Args:
            x: tokens of one or more chunks, [rows, T, S, dim].
            conditioning: of the same chunks.
            attend: attention over the history; it gets unrotated q, k, v [rows, H, T * S, D].
        """
        if self.patches is None:
            return self._block(layer, x, conditioning, attend)
        plain = partial(self._block, layer, x, conditioning, attend)
        return self.patches.block(layer, x, conditioning, attend, plain)

    def _block(self, layer: int, x: Tensor, conditioning: Conditioning, attend: Attention) -> Tensor:
        with self.whole(layer):
            return self._whole_block(layer, x, conditioning, attend)

    def _whole_block(self, layer: int, x: Tensor, conditioning: Conditioning, attend: Attention) -> Tensor:
        read = partial(self._read, layer, texts=conditioning.texts)
        return self._through(self.network.blocks[layer], x, conditioning.modulation, self.heads, attend, read)

    def _through(
        self, block: Any, x: Tensor, modulation: Tensor, heads: int, attend: Attention, read: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Runs a block's modules over tokens [rows, T, S, dim] with a modulation [rows, T or 1, 6, dim]."""
        asks, asks_of_text, reads, feeds = self.parts
        # One modulation a frame (or one for all) is broadcast over its S tokens.
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (block.modulation.to(x)[:, None] + modulation).unsqueeze(3).unbind(2)
        )
        y = attend(*asks(block, x, shift1, scale1, heads))
        x, y = asks_of_text(block, x, y, gate1, heads)
        y = read(y)
        x = reads(block, x, y)
        del y
        return feeds(block, x, shift2, scale2, gate2)

    def _read(self, layer: int, q: Tensor, texts: Sequence[Sequence[Context]]) -> Tensor:
        """Cross-attention [rows, H, tokens, D], at once over neighbouring chunks that have the same text."""
        branches = []
        for number, part in enumerate(q.chunk(len(texts[0]))):
            runs = [list(run) for _, run in groupby((chunk[number] for chunk in texts), key=id)]
            tokens = q.shape[2] // len(texts)
            asked = part.split([tokens * len(run) for run in runs], dim=2)
            answers = [self.attention(some, *run[0][layer]) for some, run in zip(asked, runs, strict=True)]
            branches.append(joined_heads(answers, dim=2))
        return joined_heads(branches)


class WholeStepsBackbone(WanBackbone):
    """Runs chunks through a network that is told time-steps cut to whole numbers, as Wan's own scheduler for UniPC
    hands them over (wan/utils/fm_solvers_unipc.py, `set_timesteps`)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """Time-steps of noise levels, of the same shape."""
        return super().timestep(sigma).floor()


def unpatched(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Makes latents [B, C, T, H, W] of patches [B, T, rows * columns, patch height * patch width * C]."""
    x = patches.unflatten(2, grid).unflatten(-1, (*patch, -1))
    # [B, T, rows, columns, patch height, patch width, C] -> [B, C, T, H, W]
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
