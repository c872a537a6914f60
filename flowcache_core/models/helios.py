"""Helios: Wan 2.1 text to video that sees clean frames before its own, the older ones coarser.

The history is latents, not keys and values. Each forward runs its tokens along with the chunk's, from three patch
embeddings: one for the newest frames (and the video's first), one of twice and one of four times the patch's sides in
time, rows and columns. All attend to all; the history is told time-step 0 and does not read the text. Only the
network is here, no family: docs/helios.md says what a run would need.

Source: diffusers 0.42.1, models/transformers/transformer_helios.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..history.cache import Attention
from ..solvers.weights import joined_heads
from .rotary import GridRotary
from .wan import CastingConv3d, Conditioning, Context, WanBackbone, WanConfig, WanNetwork, join_heads

COARSENESS = {"long": 4, "mid": 2, "short": 1}  # of the history's parts, in the order of their tokens
MOST_SCALE = 10.0  # of the history's keys, where they are scaled


class Parts(NamedTuple):
    """The history, oldest part first; a part may be None, which leaves it out.

    Attributes:
        long, mid, short: latents of one video, [1, C, frames, H, W]; the video's first frame stands before the newest
            ones in `short`.
    """

    long: Tensor | None = None
    mid: Tensor | None = None
    short: Tensor | None = None


class Places(NamedTuple):
    """Where frames stand in time: those of the history's parts, and the chunk's own.

    The default is what pipelines/helios/pipeline_helios.py takes: the first frame, 16, 2 and 1 frames, and 9. It is the
    same for all chunks.
    """

    long: Sequence[int] = range(1, 17)
    mid: Sequence[int] = range(17, 19)
    short: Sequence[int] = (0, 19)
    own: Sequence[int] = range(20, 29)


@dataclass(frozen=True)
class HeliosConfig(WanConfig):
    """Sizes of a Helios network.

    Attributes:
        amplified: the history's keys are scaled, by a learned number for each head.
    """

    amplified: bool = False

    def network(self) -> "HeliosNetwork":
        """Makes a network of these sizes."""
        return HeliosNetwork(self)


class HeliosNetwork(WanNetwork):
    """The parameters of a Helios network, under Wan 2.1's names where there are such."""

    def __init__(self, config: HeliosConfig):
        super().__init__(config)
        for name, times in COARSENESS.items():
            frames, rows, columns = (times * side for side in config.patch_size)
            patch = (frames, rows, columns)
            setattr(self, f"patch_{name}", CastingConv3d(config.in_dim, config.dim, patch, patch))
        if config.amplified:
            for block in self.blocks.children():
                scale = nn.Parameter(torch.ones(config.num_heads))
                block.get_submodule("self_attn").register_parameter("history_key_scale", scale)


def coarse(axis: Tensor, times: int) -> Tensor:
    """Means of cosines and sines [2, places, pairs] over so many neighbouring places; the last is repeated where some
    are missing. A mean turns a pair and shortens it."""
    missing = -axis.shape[1] % times
    whole = torch.cat([axis, axis[:, -1:].expand(-1, missing, -1)], dim=1)
    return whole.unflatten(1, (-1, times)).mean(dim=2)


def table(rotary: GridRotary, places: Places, grid: tuple[int, int], own_grid: tuple[int, int]) -> Tensor:
    """The rotary table of all tokens, those of the history first, float32 [2, tokens, head_dim / 2] on the CPU.

    Args:
        places: of the frames; a part without any is left out.
        grid: rows and columns of tokens of a frame of the history, were it embedded as finely as the chunk.
        own_grid: the same of the chunk, which may be smaller than its history's frames.
    """
    parts = []
    for name, times in COARSENESS.items():
        frames = torch.tensor(getattr(places, name))
        if len(frames):
            # Each pair turns by one side alone, so that a block of places has the mean along that side.
            parts.append(rotary.grid([coarse(axis, times) for axis in rotary.axes(frames, *grid)]))
    return torch.cat([*parts, rotary.table(torch.tensor(places.own), *own_grid)], dim=1)


class HeliosBackbone(WanBackbone):
    """Runs a chunk through a Helios network: first `show` it a history, then as `WanBackbone`, a chunk at a time.

    Args:
        network: a `HeliosNetwork`.
        attention: used for what is read of the text.

    Attributes:
        history: the shown history's tokens, [1, 1, tokens, dim], in the order of `COARSENESS`; none at first.
    """

    history: Tensor | None = None

    def show(self, parts: Parts) -> None:
        """Embeds the history that a chunk's forwards see; it is the same at all of its steps."""
        shown = [(name, getattr(parts, name)) for name in COARSENESS if getattr(parts, name) is not None]
        tokens = [self._embedded(getattr(self.network, f"patch_{name}"), latents) for name, latents in shown]
        self.history = torch.cat(tokens, dim=1)[:, None] if tokens else None

    def _embedded(self, layer: nn.Conv3d, latents: Tensor) -> Tensor:
        """Tokens [B, tokens, dim] of latents [B, C, frames, H, W], whose last places are repeated to fill a patch."""
        sides = zip(latents.shape[:1:-1], layer.kernel_size[::-1], strict=True)
        padding = [places for size, side in sides for places in (0, -size % side)]
        tokens = layer(F.pad(latents.float(), padding, mode="replicate"))
        return tokens.flatten(2).transpose(1, 2).to(latents.dtype)

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence[Sequence[Context]]) -> Conditioning:
        """Prepares what the blocks are told: modulation [rows, 2, 6, dim] of the history, at level 0, and of the chunk.

        Args:
            sigma: noise level, [rows].

        Raises:
            UserError: it has a level for each frame: chunks do not go through together.
        """
        if sigma.dim() != 1:
            raise UserError(f"Noise levels have the shape {list(sigma.shape)}, expected one for each row.")
        return super().conditioning(x, torch.stack([torch.zeros_like(sigma), sigma], dim=1), texts)

    def embed(self, x: Tensor) -> Tensor:
        """Makes tokens [B, 1, tokens, dim] of a latent [B, C, T, H, W]: those of the history, then its own."""
        own = super().embed(x).flatten(1, 2)[:, None]
        return own if self.history is None else torch.cat([self.history.to(own).expand(len(x), -1, -1, -1), own], dim=2)

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Takes the blocks' input from their output, of the chunk's own tokens, [B, T, rows * columns, dim]."""
        own = super().embed(x)
        tokens = own.shape[1] * own.shape[2]
        return self.exact(hidden[:, 0, -tokens:].view_as(own)) - self.exact(own)

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """Gives the velocity [B, C, T, H, W] from the latent, its noise level and a residual."""
        return self.velocity(x, self.patches_of(x, sigma, super().embed(x) + residual))

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches: the patch embedding of the chunk's own tokens."""
        return super().embed(x)

    def _through(
        self, block: Any, x: Tensor, modulation: Tensor, heads: int, attend: Attention, read: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Runs a block's modules over tokens [rows, 1, tokens, dim] with a modulation [rows, 2, 6, dim]."""
        asks, asks_of_text, reads, feeds = self.parts
        before = 0 if self.history is None else self.history.shape[2]
        past, own = x.split([before, x.shape[2] - before], dim=2)
        told = (block.modulation.to(x)[:, None] + modulation).unsqueeze(3)  # [rows, 2, 6, 1, dim]
        then, now = (level.unbind(2) for level in told.split(1, dim=1))  # shift, scale, gate; those of the feed-forward
        asked = [asks(block, own, *now[:2], heads)]
        if before:
            q, k, v = asks(block, past, *then[:2], heads)
            asked.insert(0, (q, k * self._key_scale(block).to(k), v))
        y = attend(*(joined_heads(list(part), dim=2) for part in zip(*asked, strict=True)))
        own, y_own = asks_of_text(block, own, y[:, :, before:], now[2], heads)
        own = feeds(block, reads(block, own, read(y_own)), *now[3:])
        if not before:
            return own
        past = torch.addcmul(past, block.self_attn.o(join_heads(y[:, :, :before])).view_as(past), then[2])
        return torch.cat([feeds(block, past, *then[3:]), own], dim=2)

    def _key_scale(self, block: Any) -> Tensor:
        """What the history's keys are multiplied by, [heads, 1, 1] or 1; that may come before they are turned."""
        scale = getattr(block.self_attn, "history_key_scale", None)
        if scale is None:
            return torch.ones(())
        return (1 + torch.sigmoid(scale) * (MOST_SCALE - 1))[:, None, None]
