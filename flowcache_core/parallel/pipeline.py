"""Each process has some of the layers, with their weights and their history; chunks and branches follow one another
through them.

What is handed on is a chunk's tokens, once a stage instead of several exchanges a layer: for processes that are joined
by a slow network. It pays where a tick has several chunks or branches; one alone passes the stages one after another.

Source of the scheme: GPipe (arXiv 1811.06965).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine.forward import Step
from ..engine.guidance import Network, Texts, WeightedGuidance
from ..errors import UserError
from ..history.cache import Attention
from ..schedule import Given
from .ranks import Ranks, shares
from .wrapped import WrappedBackbone


def keep_layers(backbone: Any, kept: range) -> None:
    """Lets go of all layers of a backbone's network but some."""
    network = backbone.network
    if hasattr(network, "videodit_blocks"):  # MAGI-1
        blocks = network.videodit_blocks.layers = network.videodit_blocks.layers[kept.start : kept.stop]
        backbone.blocks = blocks
    else:
        network.blocks = network.blocks[kept.start : kept.stop]
    backbone.layers = len(kept)


class SomeLayers:
    """A network of which some layers are seen, and whose others are somebody else's."""

    def __init__(self, network: Any, kept: range):
        self._network, self.blocks = network, network.blocks[kept.start : kept.stop]

    def __getattr__(self, name: str):
        return getattr(self._network, name)


def look_at_layers(backbone: Any, kept: range) -> None:
    """Has a backbone run some layers of its network, which itself is left as it is."""
    if hasattr(backbone.network, "videodit_blocks"):  # MAGI-1
        backbone.blocks = backbone.blocks[kept.start : kept.stop]
    else:
        backbone.network = SomeLayers(backbone.network, kept)
    backbone.layers = len(kept)


class PipelineBackbone(WrappedBackbone):
    """Runs this process's layers of a network.

    Args:
        inner: runs the whole network.
        ranks: the processes, in the order of the layers.
        keep: takes all layers but some away from a backbone.

    Attributes:
        held: this process's layers.
    """

    by_chunk = True

    def __init__(self, inner: Any, ranks: Ranks, keep: Callable[[Any, range], None] = keep_layers):
        if inner.layers < ranks.size:
            raise UserError(f"The network has {inner.layers} layers, too few for {ranks.size} processes; take fewer.")
        self.held = shares(inner.layers, ranks.size)[ranks.rank]
        keep(inner, self.held)
        super().__init__(inner)
        self.ranks = ranks
        self.sending: list[Callable[[], None]] = []

    @property
    def sizes(self):
        """Of this process's part."""
        whole = self.inner.sizes
        return replace(whole, layers=self.layers, text_width=whole.text_width // whole.layers * self.layers)

    @property
    def last(self) -> bool:
        """Whether this process has the last layers, and so the velocities."""
        return self.ranks.rank == self.ranks.size - 1

    def block(self, layer: int, x: Tensor, conditioning, attend: Attention) -> Tensor:
        """Runs one block; before this process's first one the tokens come from the process before, after its last one
        they go to the next."""
        rank = self.ranks.rank
        with self.replay:
            if layer == 0 and rank:
                (x,) = self.replay.once(lambda: self._received(x))
            x = self.inner.block(layer, x, conditioning, attend)
            if layer == self.layers - 1 and not self.last:
                self.sending.append(self.ranks.send(x, rank + 1))
        return x

    def residual(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the last process makes of the last layer's tokens; elsewhere something of its shape."""
        return self.inner.residual(x, hidden) if self.last else hidden

    def head(self, x: Tensor, sigma: Tensor, residual: Tensor) -> Tensor:
        """The velocity in the last process; elsewhere something of its shape, until `spread` says what it is."""
        return self.inner.head(x, sigma, residual) if self.last else torch.zeros_like(x)

    def settle(self) -> None:
        """Waits until what was sent has arrived."""
        while self.sending:
            self.sending.pop(0)()

    def _received(self, x: Tensor) -> list[Tensor]:
        into = x.new_empty(x.shape)
        self.ranks.receive(into, self.ranks.rank - 1)
        return [into]


class OneByOne:
    """Guidance whose branches go through the network one after another, so that they follow one another through the
    layers of several processes.

    Args:
        guidance: of the run.
    """

    at_once = False

    def __init__(self, guidance: WeightedGuidance):
        self.guidance = guidance
        self.texts = guidance.texts

    def mix(self, step: Step) -> Hashable:
        """Names the sum of branches that it takes at a step."""
        return self.guidance.mix(step)

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Gives all that a chunk is shown, in all branches."""
        return self.guidance.texts_of(chunk)

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Runs all branches of all steps."""
        names = tuple(self.texts)
        by_branch = [network(steps, (name,), one_text(self.guidance, number)) for number, name in enumerate(names)]
        return summed(self.guidance, steps, by_branch), names


def one_text(guidance: WeightedGuidance, number: int) -> Texts:
    """The text of one branch, by chunk."""
    return lambda chunk: [guidance.texts_of(chunk)[number]]


def summed(guidance: WeightedGuidance, steps: Sequence[Step], by_branch: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The guided velocity of each step, from those of each branch."""
    return [guidance.sum(step.sigma, parts) for step, *parts in zip(steps, *by_branch, strict=True)]
