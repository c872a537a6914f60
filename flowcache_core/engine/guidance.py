"""From branches of guidance to one velocity."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..schedule import Given
from ..solvers.weights import weighted
from .forward import Step

Texts = Callable[[int | Given], list[Tensor]]  # chunk -> a text embedding [B, tokens, width] for each branch


class Again(NamedTuple):
    """A further call for a branch at a step that the network was run for already, as a function makes that looks at
    what guidance gives: it sees the branch's history and leaves nothing there.

    Attributes:
        branch: that it is of.
        number: of the call, from 1.
    """

    branch: Hashable
    number: int

    def __str__(self) -> str:
        return f"{self.branch} again {self.number}"


class Network(Protocol):
    """Runs a network over steps whose x holds all branches, [branches * B, C, T, H, W]; gives a velocity for each.

    Branches may be divided among devices: then `backbone` runs the network of the one that x is on, and calls come from
    several threads. A branch stays where it is first run.
    """

    def __call__(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]: ...


class Guidance(Protocol):
    """Turns branches of guidance into one velocity: ours below, or the host's guider.

    Attributes:
        at_once: it asks for all chunks of a tick in one call.
    """

    at_once: bool

    def mix(self, step: Step) -> Hashable:
        """Names the sum of branches that it takes at a step."""

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Gives all that a chunk is shown, an embedding [B, tokens, width] for each branch."""

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Asks for steps, and says which branches their guided velocities are the sum of."""


@dataclass
class WeightedGuidance:
    """A weighted sum of any number of branches, all run in one batch; classifier-free guidance is {cond: s, uncond: 1 -
    s}.

    Attributes:
        texts: for each branch a text embedding [B, tokens, width], or a function of the chunk that gives one.
        weights: for each branch its weight, or a function of the noise level that gives them.
    """

    texts: Mapping[Hashable, Tensor | Callable[[int | Given], Tensor]]
    weights: Mapping[Hashable, float] | Callable[[float], Mapping[Hashable, float]]
    at_once = True

    def mix(self, step: Step) -> Hashable:
        """Names the sum of branches that it takes at a step."""
        return tuple(self._weights(step.sigma).items())

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Runs all branches of all steps."""
        names = tuple(self.texts)
        asked = [step._replace(x=torch.cat([step.x] * len(names))) for step in steps] if len(names) > 1 else steps
        results = network(asked, names, self.texts_of)
        return [
            self.sum(step.sigma, result.chunk(len(names))) for step, result in zip(steps, results, strict=True)
        ], names

    def sum(self, sigma: float, velocities: Sequence[Tensor]) -> Tensor:
        """The guided velocity at a noise level, of one for each branch."""
        return weighted(velocities, list(self._weights(sigma).values()))

    def _weights(self, sigma: float) -> Mapping[Hashable, float]:
        weights = self.weights(sigma) if callable(self.weights) else self.weights
        return {name: weights[name] for name in self.texts}

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Each branch's text at a chunk."""
        return [text(chunk) if callable(text) else text for text in self.texts.values()]


def classifier_free(positive, negative=None, scale: float = 1.0) -> WeightedGuidance:
    """Makes classifier-free guidance; at scale 1 only the conditional branch is run."""
    if negative is None or scale == 1.0:
        return WeightedGuidance({"cond": positive}, {"cond": 1.0})
    return WeightedGuidance({"cond": positive, "uncond": negative}, {"cond": scale, "uncond": 1.0 - scale})
