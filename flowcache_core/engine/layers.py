"""A network's blocks over several chunks: layer by layer and, within the layer, chunk by chunk.

A layer's weights are used for all chunks before the next layer's are, and keys and values of one layer are all that
chunks need of each other. Small chunks go through a layer's products together, for that keeps a device busy; large ones
do so one by one, so that what a block needs inside is that of one chunk.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..history.cache import Attention, History
from ..history.offload import Movable, attempts
from ..schedule import Given
from ..solvers.weights import joined, joined_heads
from .forward import Step


class Backbone(Protocol):
    """A network by layers; see `models.wan.WanBackbone`. One that has `by_chunk` set wants each chunk to go through all
    its layers before the next chunk does: it hands chunks on to the process that has the layers behind them."""

    layers: int

    def embed(self, x: Tensor) -> Tensor: ...

    def conditioning(self, x: Tensor, sigma: Tensor, texts: Sequence) -> object: ...

    def block(self, layer: int, x: Tensor, conditioning, attend: Attention) -> Tensor: ...

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor: ...

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor: ...

    def grid(self, height: int, width: int) -> tuple[int, int]: ...


class Stack(NamedTuple):
    """A network that a forward goes through.

    Attributes:
        backbone: runs it.
        first: number of its first layer among those of the history.
    """

    backbone: Any
    first: int


def stacks_of(backbone: Any, step: Step) -> list[Stack]:
    """The networks that a step goes through: one, or of a backbone of several the one for its noise level; a clean pass
    goes through all of them, one after the other."""
    if not has_stacks(backbone):
        return [Stack(backbone, 0)]
    return backbone.stacks(step.sigma, step.place.is_clean_pass)


def has_stacks(backbone: object) -> bool:
    """Whether a backbone has several networks; then one chunk is run after the other, over a history."""
    return hasattr(backbone, "stacks")


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
    """Makes groups of neighbours alike in shape with at most `together` tokens, or of a single chunk.

    Args:
        texts: each step's, as the backbone's `conditioning` takes them.
    """
    groups = []
    for _, run in groupby(zip(steps, texts, strict=True), key=lambda pair: pair[0].x.shape):
        alike = list(run)
        size = max(1, together // tokens_of(backbone, alike[0][0].x))
        for first in range(0, len(alike), size):
            chosen, shown = zip(*alike[first : first + size], strict=True)
            x = joined([step.x for step in chosen], dim=2)
            levels = levels_of(chosen[0]._replace(x=x)) if len(chosen) == 1 else frame_levels(chosen)
            groups.append(Group(chosen, x, levels, backbone.conditioning(x, levels, shown), backbone.embed(x)))
    return groups


def run_layers(
    backbone: Backbone,
    steps: Sequence[Step],
    texts: Callable[[Step], Sequence],
    together: int,
    histories: Sequence[History],
    attend: AttendChunk,
    stored: Sequence[int | Given] = (),
    movable: Collection[Movable] | None = None,
    check: Callable[[], None] = lambda: None,
    first: int = 0,
) -> list[Group]:
    """Runs all layers over steps; in each of them, oldest chunk first.

    Args:
        texts: of a step, as the backbone's `conditioning` takes them.
        together: tokens that go through a product at once, at most.
        histories: which the steps' chunks write to and see.
        attend: of one chunk.
        stored: chunks that become clean with this.
        movable: histories that may move to system memory where the device runs out of its own; None for the same.
        check: called before every group of every layer; may raise to end the run.
        first: number of the network's first layer among those of the histories, by which `attend` is told.

    Returns:
        The groups, with the last layer's hidden tokens.
    """
    movable = histories if movable is None else movable
    for history in histories:
        for attempt in attempts(movable):
            with attempt:
                history.arrange([step.place.chunk for step in steps], stored)
    for attempt in attempts(movable):
        with attempt:
            at_most = 1 if by_chunk(backbone) else together
            groups = groups_of(backbone, steps, [texts(step) for step in steps], at_most)
    layers = range(backbone.layers)
    rounds = [(layer, groups) for layer in layers]
    if by_chunk(backbone):
        rounds = [(layer, [group]) for group in groups for layer in layers]
    for layer, together_now in rounds:
        for history in histories:
            for attempt in attempts(movable):
                with attempt:
                    history.open_layer(first + layer)
        for group in together_now:
            check()

            def attended(q: Tensor, k: Tensor, v: Tensor, layer: int = layer, group: Group = group) -> Tensor:
                chunks = zip(*(part.chunk(len(group.steps), dim=2) for part in (q, k, v)), strict=True)
                answers = [attend(first + layer, step, *qkv) for step, qkv in zip(group.steps, chunks, strict=True)]
                return joined_heads(answers, dim=2)

            for attempt in attempts(movable):
                with attempt:
                    group.hidden = backbone.block(layer, group.hidden, group.conditioning, attended)
        for history in histories:
            for attempt in attempts(movable):
                with attempt:
                    history.close_layer(first + layer)
    return groups


def by_chunk(backbone: object) -> bool:
    """Whether each chunk goes through all layers before the next one does; then every layer stores active chunks."""
    return getattr(backbone, "by_chunk", False)


def row_levels(sigma: float, x: Tensor) -> Tensor:
    """One noise level for each row of x [B, ...], made on its device."""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


def levels_of(step: Step) -> Tensor:
    """Noise levels of a step, [rows], or [rows, frames] where some of its frames are given."""
    return frame_levels([step]) if step.given else row_levels(step.sigma, step.x)


def tokens_of(backbone: Backbone, x: Tensor) -> int:
    """Tokens of a latent, all rows counted."""
    rows, columns = backbone.grid(*x.shape[-2:])
    return x.shape[0] * x.shape[2] * rows * columns


def frame_levels(steps: Sequence[Step]) -> Tensor:
    """Noise levels [rows, frames] of latents that lie behind one another."""
    parts: list[Tensor] = []
    for step in steps:
        levels = row_levels(step.sigma, step.x)[:, None]
        parts += [torch.zeros_like(levels).expand(-1, step.given), levels.expand(-1, step.x.shape[2] - step.given)]
    return torch.cat(parts, dim=1)
