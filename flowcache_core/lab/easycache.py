"""EasyCache's rule as ComfyUI applies it: one decision for the whole latent, from how strongly it has answered so far.

The output of a recomputed step changed by so much for so much change of the input; with that rate, the change of the
input since the last recomputed step predicts the output's, in parts of its size. The predictions are added up, and the
sum decides. A step that is not recomputed gives the input plus the last difference between output and input.

Source: ComfyUI, comfy_extras/nodes_easycache.py (EasyCache, arXiv 2507.02860). The host starts it at 15% of the noise
levels and looks at every 8th row and column; here it starts as soon as it can, which lets it reach higher speeds, and
sees every value.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ..engine.runner import Runner, Step, Text
from ..schedule import CLEAN, Place


class EasyCacheRunner(Runner):
    """A runner under EasyCache's rule; the window is the latent of all active chunks. For one branch of guidance."""

    threshold = 0.2

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.inputs: dict[int, Tensor] = {}  # of each chunk, when it was last recomputed
        self.outputs: dict[int, Tensor] = {}
        self.before: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})  # both, as they were a tick ago
        self.rate: float | None = None  # change of the output over change of the input
        self.drift = 0.0
        self.again = True

    def plan(self, steps: Sequence[Step]) -> None:
        super().plan(steps)
        self._learn()
        self.before = (dict(self.inputs), dict(self.outputs))
        known = [(step.x, step.place.chunk) for step in steps if step.place.chunk in self.outputs]
        self.again = self.rate is None or not known
        if self.rate is not None and not self.again:
            moved = _distance([x for x, _ in known], [self.inputs[chunk] for _, chunk in known])
            size = _size([self.outputs[chunk] for _, chunk in known])
            self.drift += self.rate * moved / size
            self.again = self.drift >= self.threshold
        if self.again:
            self.drift = 0.0

    def _learn(self) -> None:
        """The rate, from the chunks that were recomputed in the tick before and had been so earlier."""
        inputs, outputs = self.before
        known = [chunk for chunk in outputs if chunk in self.outputs and self.outputs[chunk] is not outputs[chunk]]
        if known:
            moved = _distance([self.inputs[chunk] for chunk in known], [inputs[chunk] for chunk in known])
            self.rate = _distance([self.outputs[chunk] for chunk in known], [outputs[chunk] for chunk in known]) / moved

    def _recompute(self, place: Place, branch: Hashable) -> bool:
        return self.again or place.step == CLEAN or place.chunk not in self.outputs

    def forward(self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Sequence[Text]) -> Iterator[Tensor]:
        for (x, _, place), velocity in zip(steps, super().forward(steps, branches, texts), strict=True):
            if not self.recomputed[place.chunk]:
                yield velocity + (x - self.inputs[place.chunk])
                continue
            if place.step != CLEAN:
                self.inputs[place.chunk], self.outputs[place.chunk] = x, velocity
            yield velocity

    def commit(self, chunk: int) -> None:
        super().commit(chunk)
        self.inputs.pop(chunk, None)
        self.outputs.pop(chunk, None)


def easycache(threshold: float) -> type[EasyCacheRunner]:
    """A runner that recomputes when the predicted change of the output has added up to the threshold."""
    return type("EasyCacheRunner", (EasyCacheRunner,), {"threshold": threshold})


def _distance(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    return torch.stack([(a - b).abs().mean() for a, b in zip(now, before, strict=True)]).mean().item()


def _size(parts: Sequence[Tensor]) -> float:
    return torch.stack([part.abs().mean() for part in parts]).mean().item()
