"""A network's blocks over several chunks: layer by layer and, within the layer, chunk by chunk.

A layer's weights are used for all chunks before the next layer's are, and keys and values of one layer are all that
chunks need of each other. Small chunks go through a layer's products together, for that keeps a device busy; large ones
do so one by one, so that what a block needs inside is that of one chunk.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..history.cache import Attention
from ..history.offload import Movable, retry_on_oom
from ..solvers.weights import joined
from .forward import Step


class Backbone(Protocol):
    """A network by layers; see `models.wan.WanBackbone`."""

    layers: int

    def embed(self, x: Tensor) -> Tensor: ...

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence) -> object: ...

    def block(self, layer: int, x: Tensor, conditioning, attend: Attention) -> Tensor: ...

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor: ...

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor: ...

    def grid(self, height: int, width: int) -> tuple[int, int]: ...


AttendChunk = Callable[[int, Step, Tensor, Tensor, Tensor], Tensor]  # layer, step, q, k, v -> q's shape


@dataclass
class Group:
    """Chunks that go through a layer's products together.

    Attributes:
        steps: of the chunks; x is [rows, C, T, H, W], alike in shape.
        x: all of them, behind one another in time.
        levels: noise levels, [rows] of one chunk or [rows, T] of several.
        conditioning: what the blocks are told.
        hidden: tokens between two layers.
    """

    steps: Sequence[Step]
    x: Tensor
    levels: Tensor
    conditioning: object
    hidden: Tensor


def groups_of(backbone: Backbone, steps: Sequence[Step], texts: Sequence, together: int) -> list[Group]:
    """Makes groups of neighbours with at most `together` tokens, or of a single chunk.

    Args:
        texts: each step's, as the backbone's `conditioning` takes them.
    """
    groups: list[Group] = []
    parts: list[list[int]] = []
    for number, step in enumerate(steps):
        before = parts[-1] if parts else []
        alike = bool(before) and steps[before[0]].x.shape == step.x.shape
        if alike and (len(before) + 1) * tokens_of(backbone, step.x) <= together:
            before.append(number)
        else:
            parts.append([number])
    for part in parts:
        chosen = [steps[number] for number in part]
        x, levels = joined([step.x for step in chosen], dim=2), levels_of(chosen)
        conditioning = backbone.conditioning(x, levels, [texts[number] for number in part])
        groups.append(Group(chosen, x, levels, conditioning, backbone.embed(x)))
    return groups


def run_layer(
    backbone: Backbone,
    layer: int,
    groups: Sequence[Group],
    attend: AttendChunk,
    histories: Collection[Movable],
    check: Callable[[], None],
) -> None:
    """Runs one layer over all groups, oldest chunk first.

    Args:
        attend: of one chunk.
        histories: may move to system memory where the device runs out of its own.
        check: called before every group; may raise to end the run.
    """
    for group in groups:
        check()

        def attended(q: Tensor, k: Tensor, v: Tensor, group: Group = group) -> Tensor:
            chunks = zip(*(part.chunk(len(group.steps), dim=2) for part in (q, k, v)), strict=True)
            answers = [attend(layer, step, *qkv) for step, qkv in zip(group.steps, chunks, strict=True)]
            return joined(answers, dim=2)

        block = partial(backbone.block, layer, group.hidden, group.conditioning, attended)
        group.hidden = retry_on_oom(block, histories)


def levels_of(steps: Sequence[Step]) -> Tensor:
    """Noise levels of steps that are run together: of rows [rows], or of frames [rows, T] where steps are several."""
    return row_levels(steps[0].sigma, steps[0].x) if len(steps) == 1 else frame_levels(steps)


def row_levels(sigma: float, x: Tensor) -> Tensor:
    """One noise level for each row of x [B, ...], made on its device."""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


def tokens_of(backbone: Backbone, x: Tensor) -> int:
    """Tokens of a latent, all rows counted."""
    rows, columns = backbone.grid(*x.shape[-2:])
    return x.shape[0] * x.shape[2] * rows * columns


def frame_levels(steps: Sequence[Step]) -> Tensor:
    """Noise levels [rows, frames] of latents that lie behind one another."""
    return torch.cat([row_levels(step.sigma, step.x)[:, None].expand(-1, step.x.shape[2]) for step in steps], dim=1)
