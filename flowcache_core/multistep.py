"""Second-order multistep solvers for the flow: DPM-Solver++ (2M) and UniPC (bh2), both on the clean estimate.

Both see the flow in lambda = log((1 - sigma) / sigma), where it is nearly linear. One solver object belongs to one
chunk and remembers the last clean estimates, so steps must come in order. Scalars are float64.

Source: DPM-Solver++, arXiv 2211.01095, equation 8 (2M); UniPC, arXiv 2302.04867, with B(h) = exp(h) - 1, as
SkyReels-V2 uses it (skyreels_v2_infer/scheduler/fm_solvers_unipc.py). UniPC's predictor of order 2 is 2M to the letter.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .combination import weighted


class DPM2M:
    """DPM-Solver++ 2M: the clean estimate extrapolated through the last two.

    Args:
        sigmas: noise levels [steps + 1], falling; the last is 0 or small.
        noise: unused; solvers that add noise draw it here.
    """

    def __init__(self, sigmas: Sequence[float], noise=None):
        self.sigmas = sigmas
        self.lambdas = [log_ratio(sigma) for sigma in sigmas]
        self.cleans: list[Tensor] = []  # the last two estimates, oldest first

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latent after `step`, from the latent before it and the velocity there; shapes [B, C, T, H, W]."""
        clean = torch.sub(x, velocity, alpha=self.sigmas[step])
        return self.predict(x, clean, step)

    coast = step

    def order(self, step: int) -> int:
        """1 at the first step, which has no past, and at the last, where lambda may be infinite."""
        return 1 if step == 0 or step == len(self.sigmas) - 2 else 2

    def gap(self, step: int) -> float:
        """How far lambda rises in a step; infinite from noise and to clean."""
        return self.lambdas[step + 1] - self.lambdas[step]

    def predict(self, x: Tensor, clean: Tensor, step: int) -> Tensor:
        self.cleans = [*self.cleans[-1:], clean]
        now, after = self.sigmas[step], self.sigmas[step + 1]
        h = self.gap(step)
        shrink = math.expm1(-h)
        target = clean
        if self.order(step) == 2:
            ratio = self.gap(step - 1) / h
            target = torch.lerp(self.cleans[0], clean, 1.0 + 0.5 / ratio)
        return (x * (after / now)).add_(target, alpha=-(1.0 - after) * shrink)


class UniPC(DPM2M):
    """UniPC of order 2 (bh2): 2M's prediction, corrected once the velocity at the predicted latent is known.

    A forecast of that velocity tells nothing new: coasting is 2M's.
    """

    def __init__(self, sigmas: Sequence[float], noise=None):
        super().__init__(sigmas)
        self.corrected: Tensor  # the latent before the last prediction, from the first step on

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """As `DPM2M.step`; `x` is what the last call gave, and is corrected before it is used."""
        clean = torch.sub(x, velocity, alpha=self.sigmas[step])
        if step > 0:
            x = self.correct(clean, step)
        self.corrected = x
        return self.predict(x, clean, step)

    def correct(self, clean: Tensor, step: int) -> Tensor:
        """The latent at `step` again, from the one before it and the clean estimates on both sides."""
        before, now = self.sigmas[step - 1], self.sigmas[step]
        h = self.gap(step - 1)
        shrink = math.expm1(-h)
        newer, older = 0.5, 0.0  # weights of the differences to the newer and the older estimate
        if self.order(step - 1) == 2:
            # Exact for a quadratic in lambda.
            ratio = -self.gap(step - 2) / h
            first = (-shrink / h - 1.0) / -h - 0.5  # phi_3 of -h, times -h
            newer_and_older = (-shrink / h - 1.0) / shrink
            slope = 2.0 * first / shrink
            older = (newer_and_older - slope) / (1.0 - ratio)
            newer, older = newer_and_older - older, older / ratio
        estimates = [*self.cleans[-2:], clean]
        weights = [older, 1.0 - newer - older, newer][-len(estimates) :]
        share = (now - 1.0) * shrink
        return weighted([self.corrected, *estimates], [now / before, *(share * weight for weight in weights)])


class SkyReelsUniPC(UniPC):
    """UniPC as SkyReels-V2's pipeline runs it, which is not quite as its scheduler means it.

    The pipeline writes the predicted latent over the one that the scheduler remembers, so the first correction starts
    from the prediction. From the second on, the scheduler's own copy is used. Over 50 steps that moves the result by
    0.2%.
    Source: skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py, the loop over `sample_schedulers`.
    """

    def step(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        if step == 1:
            self.corrected = x
        return super().step(x, velocity, step)


def log_ratio(sigma: float) -> float:
    """lambda of a noise level."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
