"""Muon in float32, for processors without 16-bit matrix instructions: torch's own (torch.optim.Muon) orthogonalises in
bfloat16 and one matrix at a time, which is 27 times slower there.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); coefficients and the scale
of an update are those of torch.optim.Muon with adjust_lr_fn="match_rms_adamw".
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Pulls the singular values of matrices [N, rows, columns] to about 1 by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum whose update of a weight matrix is orthogonalised; matrices of one shape go together."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # torch types it as two overloads
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append((weight, self._ahead(weight, group["momentum"])))
            for shape, pairs in alike.items():
                updates = orthogonalised(torch.stack([ahead for _, ahead in pairs])) * 0.2 * max(shape) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _ahead(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum of a weight's gradient."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        average = state["average"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum)
