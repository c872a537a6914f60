"""Networks of the MAGI-1 layout: our own module, and how to run one chunk through it.

`MagiNetwork` is the architecture: parameters under upstream's names, so that SandAI's shards load as they are.
`MagiBackbone` runs its modules. Every block attends to the history and to the caption side by side, from one
normalised input; its outputs pass a gate (from noise level and caption kind) and a norm before they are added. Most of
a block runs in the network's own precision; embedders, norms of queries and keys, norms after the gates, the output
projection's product and the head run in float32.

Upstream counts time t from noise (0) to clean (1) and its velocity points to clean; here sigma = 1 - t and the velocity
is noise - clean, the negative of upstream's.

Source: MAGI-1, inference/model/dit/dit_model.py and dit_module.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...history.plan import NetworkSizes
from ...history.positions import IN_TORCH, RotaryProduct
from ...history.products import wide_product
from ...solvers.weights import joined_heads
from ..fit import fit
from ..rotary import GridRotary
from ..wan import Attend, Attention, CastingConv3d, Compiled, unpatched
from .config import MagiConfig
from .fp8 import Fp8Linear, SmoothFp8Linear

TIME_WIDTH = 256  # of the sinusoid
TIME_SCALE = 1000.0
MERGE_GROUPS = 8  # self- and cross-attention are interleaved in this many groups before the output projection
BASE_AREA = 16 * 16  # tokens of a frame at which rows and columns have rotary positions one apart


class Casting:
    """Layers that bring their weights to the input's precision, as ComfyUI's `manual_cast` operations do."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    class LayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    class WideLinear(nn.Linear):
        """Gives float32, whatever the input's precision: exact products, summed in float32."""

        def forward(self, x: Tensor) -> Tensor:
            return wide(x, self.weight.to(x.dtype))

    Conv3d = CastingConv3d
    Fp8Linear = Fp8Linear
    SmoothFp8Linear = SmoothFp8Linear


def wide(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies inputs [B, tokens, inputs] by a matrix [outputs, inputs] of the same precision, into float32."""
    return wide_product(x.flatten(0, 1)[None], weight.t()[None])[0].unflatten(0, x.shape[:2])


class ShiftedLayerNorm(nn.LayerNorm):
    """Layer norm whose stored gain is the gain minus one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x) + 1, self.bias.to(x), self.eps)


class MagiRope(nn.Module):
    """Learned frequencies, one set for time, rows and columns: head_dim / 8 pairs each, the rest is not rotated."""

    def __init__(self, head_dim: int, **where):
        super().__init__()
        count = head_dim // 8
        exponents = torch.arange(count, dtype=torch.float32) / count
        self.bands = nn.Parameter((10000.0**-exponents).to(**where))


class MagiTimeEmbedder(nn.Module):
    def __init__(self, config: MagiConfig, operations, **where):
        super().__init__()
        width = config.condition_width
        self.mlp = nn.Sequential(
            operations.Linear(TIME_WIDTH, width, **where), nn.SiLU(), operations.Linear(width, width, **where)
        )


class MagiCaptionEmbedder(nn.Module):
    def __init__(self, config: MagiConfig, operations, **where):
        super().__init__()
        self.y_proj_xattn = nn.Sequential(operations.Linear(config.caption_width, config.width, **where), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(operations.Linear(config.caption_width, config.condition_width, **where))
        self.null_caption_embedding = nn.Parameter(torch.zeros(config.caption_tokens, config.caption_width, **where))


class MagiProjections(nn.Module):
    def __init__(self, config: MagiConfig, operations, fp8: bool, **where):
        super().__init__()
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        linear = operations.Fp8Linear if fp8 else operations.Linear
        self.layer_norm = operations.LayerNorm(config.width, eps=config.eps, **where)
        self.q = linear(config.width, queries, bias=False, **where)
        self.qx = linear(config.width, queries, bias=False, **where)
        self.k = linear(config.width, keys, bias=False, **where)
        self.v = linear(config.width, keys, bias=False, **where)


class MagiAttention(nn.Module):
    def __init__(self, config: MagiConfig, operations, fp8: bool, precise: dict, where: dict):
        super().__init__()
        head, keys = config.head_dim, config.kv_heads * config.head_dim
        linear = operations.SmoothFp8Linear if fp8 else operations.WideLinear
        self.linear_qkv = MagiProjections(config, operations, fp8, **where)
        self.linear_kv_xattn = operations.Linear(config.width, 2 * keys, bias=False, **where)
        self.linear_proj = linear(2 * config.heads * head, config.width, bias=False, **where)
        self.q_layernorm = ShiftedLayerNorm(head, config.eps, **precise)
        self.k_layernorm = ShiftedLayerNorm(head, config.eps, **precise)
        self.q_layernorm_xattn = ShiftedLayerNorm(head, config.eps, **where)
        self.k_layernorm_xattn = ShiftedLayerNorm(head, config.eps, **where)


class MagiFeedForward(nn.Module):
    def __init__(self, config: MagiConfig, operations, fp8: bool, **where):
        super().__init__()
        self.gated = config.gated
        inner = config.ffn_width * (2 if config.gated else 1)
        self.layer_norm = operations.LayerNorm(config.width, eps=config.eps, **where)
        widen = operations.Fp8Linear if fp8 else operations.Linear
        narrow = operations.SmoothFp8Linear if fp8 else operations.Linear
        self.linear_fc1 = widen(config.width, inner, bias=False, **where)
        self.linear_fc2 = narrow(config.ffn_width, config.width, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(self.layer_norm(x))
        if not self.gated:
            return self.linear_fc2(F.gelu(x))
        gate, x = x.chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * x)


class MagiGates(nn.Module):
    def __init__(self, config: MagiConfig, operations, **where):
        super().__init__()
        self.proj = nn.Sequential(operations.Linear(config.condition_width, 2 * config.width, **where))

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Makes the gates of attention and feed-forward, [B, 1, width] in float32, of a condition [B, its width]."""
        gates = self.proj(F.silu(condition))
        attention, feed_forward = torch.tanh(gates.float()).to(gates.dtype).float()[:, None].chunk(2, dim=-1)
        return attention, feed_forward


class MagiBlock(nn.Module):
    def __init__(self, config: MagiConfig, operations, fp8: bool, precise: dict, where: dict):
        super().__init__()
        self.ada_modulate_layer = MagiGates(config, operations, **where)
        self.self_attention = MagiAttention(config, operations, fp8, precise, where)
        self.self_attn_post_norm = ShiftedLayerNorm(config.width, config.eps, **precise)
        self.mlp = MagiFeedForward(config, operations, fp8, **where)
        self.mlp_post_norm = ShiftedLayerNorm(config.width, config.eps, **precise)


class MagiBlocks(nn.Module):
    def __init__(self, config: MagiConfig, operations, precise: dict, where: dict):
        super().__init__()
        ends = (0, config.layers - 1)  # never quantised
        self.layers = nn.ModuleList(
            MagiBlock(config, operations, config.fp8 and layer not in ends, precise, where)
            for layer in range(config.layers)
        )
        self.final_layernorm = ShiftedLayerNorm(config.width, config.eps, **precise)


class MagiFinal(nn.Module):
    def __init__(self, config: MagiConfig, operations, **where):
        super().__init__()
        self.linear = operations.Linear(config.width, config.patch**2 * config.fed_channels, bias=False, **where)


class MagiNetwork(nn.Module):
    """The parameters of a MAGI-1 network; `MagiBackbone` runs it.

    Args:
        config: sizes.
        dtype: precision of the blocks. What upstream keeps in float32 is float32 whatever this is.
        device: where the parameters are made.
        operations: where Linear, LayerNorm, Conv3d, the wide and the fp8 layers come from. They must cast their weights
            to the input's precision: `Casting`, or ComfyUI's `manual_cast` with ours.
    """

    def __init__(self, config: MagiConfig, dtype: torch.dtype = torch.float32, device=None, operations=Casting):
        super().__init__()
        self.config = config
        self.dtype = dtype
        precise, where = {"dtype": torch.float32, "device": device}, {"dtype": dtype, "device": device}
        patch = (1, config.patch, config.patch)
        self.x_embedder = operations.Conv3d(config.fed_channels, config.width, patch, patch, bias=False, **precise)
        self.t_embedder = MagiTimeEmbedder(config, operations, **precise)
        self.y_embedder = MagiCaptionEmbedder(config, operations, **precise)
        self.rope = MagiRope(config.head_dim, **precise)
        self.videodit_blocks = MagiBlocks(config, operations, precise, where)
        self.final_linear = MagiFinal(config, operations, **precise)


def load_network(
    tensors: Mapping[str, Tensor], distilled: bool, dtype: torch.dtype | None = None, operations=Casting
) -> MagiNetwork:
    """Makes a network over a checkpoint's tensors, which are neither copied nor converted: mapped files stay mapped.

    Args:
        tensors: under upstream's names; special tokens beside them (magi_text.py) are passed over.
        distilled: whether the network is told the step size; it cannot be told from the tensors.
        dtype: precision of the blocks' computation; by default that of the first block's matrices.

    Raises:
        UserError: tensors are missing, left over or of the wrong shape.
    """
    config = MagiConfig.from_tensors(tensors, distilled)
    stored = tensors["videodit_blocks.layers.0.self_attention.linear_qkv.q.weight"].dtype
    network = MagiNetwork(config, dtype or stored, "meta", operations)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("special_tokens.")}
    return fit(network, own, "MAGI-1 network")


@dataclass(frozen=True)
class MagiRotary(GridRotary):
    """Rotary positions from learned frequencies, for heads in the order that `paired` brings them in.

    Frames count from the start of the video. Rows and columns are centred, and scaled so that a frame of any size spans
    what a frame of 16 x 16 tokens of the same shape spans.
    """

    rope: MagiRope
    head_dim: int
    product: RotaryProduct = IN_TORCH

    @cached_property
    def bands(self) -> Tensor:
        """Frequencies, float64 [head_dim / 8] on the CPU."""
        return self.rope.bands.detach().cpu().double()

    @property
    def parts(self) -> tuple[int, int, int]:
        """Widths of the parts for time, rows and columns; they come first in a head."""
        part = 2 * len(self.rope.bands)
        return part, part, part

    def angles(self, positions: Tensor, width: int) -> Tensor:
        """Positions [...] on the CPU to angles [..., width / 2] in float64."""
        return positions.double()[..., None] * self.bands

    def sides(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Positions of rows and columns, on the CPU."""
        unit = math.sqrt(rows * columns / BASE_AREA)
        return centred(rows, unit), centred(columns, unit)

    def paired(self, x: Tensor) -> Tensor:
        """Heads [..., D] from upstream's order, where partners are 3 D / 8 apart, to neighbouring pairs.

        Queries and keys are reordered alike, so their products stay as they are.
        """
        rotated = sum(self.parts)
        pairs = x[..., :rotated].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return torch.cat([pairs, x[..., rotated:]], dim=-1)


def centred(count: int, unit: float) -> Tensor:
    """Positions [count] around zero that span count / unit - 1, in float64 on the CPU."""
    places = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    return places / max(1, count - 1) * (count / unit - 1)


class CaptionKeys(NamedTuple):
    """One caption's keys and values in one layer, [1, kv_heads, tokens, D]."""

    keys: Tensor
    values: Tensor


class MagiText(NamedTuple):
    """A chunk's text in one branch, as `magi_text.py` makes it, and how long its steps are.

    Attributes:
        embedding: the text encoder's output after the special tokens, [B, tokens, caption_width].
        mask: [B, tokens], nonzero where there is a token, which come first; captions differ in length. On the CPU,
            which must know that length.
        captioned: False in branches without text.
        step_size: what a distilled network is told, `step_size` of magi_sampling.py.
    """

    embedding: Tensor
    mask: Tensor
    captioned: bool = True
    step_size: float | None = None


class MagiContext(NamedTuple):
    """What a chunk's forward is conditioned on besides its noise level.

    Attributes:
        captions: a layer, a row of the batch: keys and values of the caption's tokens.
        kind: [1, condition_width], says whether there is a caption and, if distilled, how long a step is.
    """

    captions: list[list[CaptionKeys]]
    kind: Tensor


class MagiConditioning(NamedTuple):
    """What the blocks are told about a chunk.

    Attributes:
        gates: what the gates are made of, [B, condition_width].
        context: of the chunk.
    """

    gates: Tensor
    context: MagiContext


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs torch's attention where several query heads share a key and value head."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# A block's parts; after the first one it attends to the history and to the caption. They are functions of a block and
# of tensors alone, so that torch.compile makes one graph of each for all layers; and cut where the last one's input can
# be let go of.


def asks_both(block: MagiBlock, x: Tensor, rotary: MagiRotary, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [B, tokens, width] to unrotated q [B, heads, tokens, D], k and v [B, kv_heads, ...], and what they ask the
    caption, of q's shape."""
    attention, project = block.self_attention, block.self_attention.linear_qkv
    y = project.layer_norm(x)

    def split(part: Tensor) -> Tensor:
        return part.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    q = rotary.paired(attention.q_layernorm(split(project.q(y)).float())).to(x.dtype)
    k = rotary.paired(attention.k_layernorm(split(project.k(y)).float())).to(x.dtype)
    return q, k, split(project.v(y)), attention.q_layernorm_xattn(split(project.qx(y)))


def adds_attention(block: MagiBlock, x: Tensor, past: Tensor, text: Tensor, gate: Tensor) -> Tensor:
    """Adds what history and caption gave, [B, heads, tokens, D] each, to tokens."""
    y = block.self_attention.linear_proj(merged(past, text))
    return (block.self_attn_post_norm(y.float() * gate) + x).to(x.dtype)


def feeds_forward(block: MagiBlock, x: Tensor, gate: Tensor) -> Tensor:
    """Adds the feed-forward to tokens."""
    y = block.mlp(x).float()
    return (block.mlp_post_norm(y * gate) + x).to(x.dtype)


def merged(past: Tensor, text: Tensor) -> Tensor:
    """Two [B, heads, tokens, D] to [B, tokens, 2 * heads * D], group by group: a group's past, then its text."""
    both = torch.stack([past, text], dim=1).permute(0, 3, 1, 2, 4).flatten(3)  # [B, tokens, 2, heads * D]
    return both.unflatten(3, (MERGE_GROUPS, -1)).transpose(2, 3).flatten(2)


class MagiBackbone(Compiled):
    """Runs chunks through a network of the MAGI-1 layout.

    Args:
        network: its blocks' precision is that of the computation.
        attention: used for cross-attention here; the history uses its own. It must accept fewer heads in keys and
            values than in queries.

    Attributes:
        whole: as in `models.wan.WanBackbone`.
    """

    def __init__(self, network: MagiNetwork, attention: Attention = grouped_attention):
        config = network.config
        self.network = network
        self.whole: Callable[[int], AbstractContextManager] = nullcontext
        self.config = config
        self.attention = attention
        self.layers = config.layers
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.blocks = cast(Sequence[MagiBlock], network.videodit_blocks.layers)
        self.rotary = MagiRotary(network.rope, config.head_dim)
        self.parts = (asks_both, adds_attention, feeds_forward)

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        return replace(self.config.sizes, layers=self.layers)  # of several processes each may have some of the layers

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of one frame of latent size height x width.

        Raises:
            UserError: a side is not a multiple of the patch.
        """
        patch = self.config.patch
        if height % patch or width % patch:
            raise UserError(
                f"The latent is {height} x {width}; MAGI-1 needs multiples of {patch}, that is of {8 * patch} pixels."
            )
        return height // patch, width // patch

    def context(self, text: MagiText) -> MagiContext:
        """Makes the conditioning of a chunk, computed once for each chunk (its text tells how much is left) and branch.

        Raises:
            UserError: the network is distilled and the text has no step size.
        """
        embedder = self.network.y_embedder
        embedded = embedder.y_proj_xattn(text.embedding.float()).to(self.network.dtype)
        rows = [row[: sum(map(bool, keep.tolist()))] for row, keep in zip(embedded, text.mask, strict=True)]
        captions = [self._captions(layer, rows) for layer in range(self.layers)]
        null = embedder.null_caption_embedding[-2 if text.captioned else -1].to(embedded.device).float()
        kind = embedder.y_proj_adaln(null[None])
        if self.config.distilled:
            if text.step_size is None:
                raise UserError("A distilled MAGI-1 must be told the step size; give the text one (magi_sampling.py).")
            kind = kind + self._time(torch.full((1,), text.step_size, dtype=torch.float32, device=kind.device))
        return MagiContext(captions, kind)

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence[Sequence[MagiContext]]) -> MagiConditioning:
        """Prepares what all blocks are told about a chunk.

        Args:
            x: latent of one chunk, [B, C, T, H, W].
            sigma: its noise level, [B], 1 noise and 0 clean.
            texts: its one context, with B rows.
        """
        ((context,),) = texts
        return MagiConditioning(self.condition(sigma, context), context)

    def trunk(self, x: Tensor, sigma: Tensor, context: MagiContext, attend: Attend) -> Tensor:
        """Runs the embedding and all blocks.

        Args:
            x: latent [B, C, T, H, W].
            sigma: noise level of the chunk, [B], 1 noise and 0 clean.
            context: what `context` gave, with B rows.
            attend: attention over the history; it gets unrotated q [B, heads, tokens, D] and k, v [B, kv_heads, ...].

        Returns:
            The blocks' output minus their input, float32 [B, T, rows * columns, width].
        """
        conditioning, hidden = self.conditioning(x, sigma, [[context]]), self.embed(x)
        for layer in range(self.layers):
            hidden = self.block(layer, hidden, conditioning, partial(attend, layer))
        return self.residual(x, hidden)

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Takes the blocks' input from their output; float32."""
        return self.exact(hidden) - self.exact(self.embed(x))

    def exact(self, tokens: Tensor) -> Tensor:
        """Tokens in the precision that residuals are kept in."""
        return tokens.float()

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the velocity [B, C, T, H, W] from the latent and a residual; the noise level plays no part."""
        return self.velocity(x, self.patches_of(x, sigma, self.exact(self.embed(x)) + residual))

    def patches_of(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Gives what each of the last layer's tokens, float32 [B, T, S, width], says of the velocity, [B, T, S, patch *
        patch * channels fed]; S may be a part of a frame's."""
        return self.network.final_linear.linear(self.network.videodit_blocks.final_layernorm(tokens))

    def velocity(self, x: Tensor, patches: Tensor) -> Tensor:
        """Puts the patches of all tokens of a latent's frames together to the velocity [B, C, T, H, W]."""
        latent = unpatched(patches, self.grid(*x.shape[-2:]), (self.config.patch, self.config.patch))
        return -(latent[:, : self.config.channels] / self.config.input_scale).to(x.dtype)

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches for change: the patch embedding, [B, T, rows * columns, width]."""
        return self.embed(x)

    def embed(self, x: Tensor) -> Tensor:
        """Makes tokens [B, T, rows * columns, width] of a latent [B, C, T, H, W]."""
        self.grid(*x.shape[-2:])
        x = x.float() * self.config.input_scale
        if self.config.doubled:
            x = torch.cat([x, x], dim=1)
        tokens = self.network.x_embedder(x).flatten(3).permute(0, 2, 3, 1)
        return tokens.to(self.network.dtype, memory_format=torch.contiguous_format).contiguous()

    def condition(self, sigma: Tensor, context: MagiContext) -> Tensor:
        """Makes what the gates come from, [B, condition_width], of noise level [B] and context."""
        embedding = self._time(1.0 - sigma)
        return (embedding + context.kind).to(self.network.dtype)

    def _time(self, t: Tensor) -> Tensor:
        """Embedding [B, condition_width] of numbers [B]; the order of products is upstream's, large angles show it."""
        half = TIME_WIDTH // 2
        places = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * places / half) * TIME_SCALE
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.network.dtype)
        return self.network.t_embedder.mlp(sinusoid.float())

    def _captions(self, layer: int, rows: Sequence[Tensor]) -> list[CaptionKeys]:
        with self.whole(layer):
            return [self._caption(self.blocks[layer].self_attention, row) for row in rows]

    def _caption(self, attention: MagiAttention, tokens: Tensor) -> CaptionKeys:
        """Keys and values of caption tokens [tokens, width]; upstream stores them head by head, key before value."""
        pairs = attention.linear_kv_xattn(tokens).unflatten(-1, (self.kv_heads, 2 * self.head_dim)).transpose(0, 1)
        keys, values = pairs[None].chunk(2, dim=-1)
        return CaptionKeys(attention.k_layernorm_xattn(keys), values)

    def block(self, layer: int, x: Tensor, conditioning: MagiConditioning, attend: Attention) -> Tensor:
        """Runs one block.

        Args:
            x: tokens of a chunk, [B, T, S, width].
            conditioning: of the chunk.
            attend: attention over the history; it gets unrotated q [B, heads, T * S, D] and k, v [B, kv_heads, ...].
        """
        with self.whole(layer):
            return self._whole_block(layer, x, conditioning, attend)

    def _whole_block(self, layer: int, x: Tensor, conditioning: MagiConditioning, attend: Attention) -> Tensor:
        block, (asks, adds, feeds) = self.blocks[layer], self.parts
        gate_attention, gate_feed_forward = block.ada_modulate_layer(conditioning.gates)
        shape, x = x.shape, x.flatten(1, 2)
        q, k, v, text = asks(block, x, self.rotary, self.head_dim)
        past = attend(q, k, v)
        del q, k, v
        text = self._read(text, conditioning.context.captions[layer])
        x = adds(block, x, past, text, gate_attention)
        del past, text
        return feeds(block, x, gate_feed_forward).view(shape)

    def _read(self, q: Tensor, captions: list[CaptionKeys]) -> Tensor:
        """Cross-attention [B, heads, tokens, D]; row by row, because captions differ in length."""
        return joined_heads([self.attention(row, *caption) for row, caption in zip(q.split(1), captions, strict=True)])
