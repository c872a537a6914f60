"""Second-order multistep solvers for the flow: DPM-Solver++ (2M) and UniPC (bh2), both on the clean estimate.

Both see the flow in lambda = log((1 - sigma) / sigma), where it is nearly linear. One solver object belongs to one
chunk and remembers the last clean estimates, so steps must come in order. Scalars are float64.

Source: DPM-Solver++, arXiv 2211.01095, equation 8 (2M); UniPC, arXiv 2302.04867, with B(h) = exp(h) - 1, as
SkyReels-V2 uses it (skyreels_v2_infer/scheduler/fm_solvers_unipc.py). UniPC's predictor of order 2 is 2M to the letter.
"""

import math
from collections.abc import Sequence

import numpy as np

from .one_step import Linear


class DPM2M(Linear):
    """DPM-Solver++ 2M: the clean estimate extrapolated through the last two, which it remembers."""

    def __init__(self, sigmas: Sequence[float], noise=None):
        super().__init__(sigmas)
        self.lambdas = [log_ratio(sigma) for sigma in sigmas]

    def weights(self, step: int, held: int, provisional: bool = False) -> np.ndarray:
        x, *cleans, velocity = np.eye(held + 2)
        cleans = [*cleans[-1:], x - self.sigmas[step] * velocity]
        return np.stack([self.predict(x, cleans, step), *cleans])

    def order(self, step: int) -> int:
        """Gives 1 at the first step, which has no past, and at the last, where lambda may be infinite."""
        return 1 if step == 0 or step == len(self.sigmas) - 2 else 2

    def gap(self, step: int) -> float:
        """Gives how far lambda rises in a step; infinite from noise and to clean."""
        return self.lambdas[step + 1] - self.lambdas[step]

    def predict(self, x: np.ndarray, cleans: Sequence[np.ndarray], step: int) -> np.ndarray:
        """Predicts the latent after a step from the one before it and the clean estimates there, the newest last."""
        now, after, h = self.sigmas[step], self.sigmas[step + 1], self.gap(step)
        target = cleans[-1]
        if self.order(step) == 2:
            ratio = self.gap(step - 1) / h
            target = target + (target - cleans[-2]) * (0.5 / ratio)
        return x * (after / now) - target * ((1.0 - after) * math.expm1(-h))


class UniPC(DPM2M):
    """UniPC of order 2 (bh2): 2M's prediction, corrected once the velocity at the predicted latent is known.

    It remembers the last two clean estimates and the corrected latent before the last prediction. A forecast of the
    velocity tells nothing new: provisional leaves the correction out.
    """

    def weights(self, step: int, held: int, provisional: bool = False) -> np.ndarray:
        x, *memory, velocity = np.eye(held + 2)
        clean = x - self.sigmas[step] * velocity
        if step > 0 and not provisional:
            x = self.correct(memory[-1] if step > 1 else self.first(x, memory), [*memory[:-1], clean], step)
        cleans = [*memory[:-1][-1:], clean]
        return np.stack([self.predict(x, cleans, step), *cleans, x])

    def first(self, predicted: np.ndarray, memory: Sequence[np.ndarray]) -> np.ndarray:
        """Gives the latent that the first correction starts from."""
        return memory[-1]

    def correct(self, start: np.ndarray, cleans: Sequence[np.ndarray], step: int) -> np.ndarray:
        """Gives the latent at `step` again, from the one before and the clean estimates on both sides, newest last."""
        before, now, h = self.sigmas[step - 1], self.sigmas[step], self.gap(step - 1)
        shrink = math.expm1(-h)
        last, clean = cleans[-2:]
        change = (clean - last) * 0.5
        if self.order(step - 1) == 2:
            # Weights of the differences to the older and the newer estimate: exact for a quadratic in lambda.
            ratio = -self.gap(step - 2) / h
            first = (-shrink / h - 1.0) / -h - 0.5  # phi_3 of -h, times -h
            newer_and_older = (-shrink / h - 1.0) / shrink
            slope = 2.0 * first / shrink
            older = (newer_and_older - slope) / (1.0 - ratio)
            change = (clean - last) * (newer_and_older - older) + (cleans[-3] - last) * (older / ratio)
        return start * (now / before) - (last + change) * ((1.0 - now) * shrink)


class SkyReelsUniPC(UniPC):
    """UniPC as SkyReels-V2's pipeline runs it, which is not quite as its scheduler means it.

    The pipeline writes the predicted latent over the one that the scheduler remembers, so the first correction starts
    from the prediction. From the second on, the scheduler's own copy is used. Over 50 steps that moves the result by
    0.2%.
    Source: skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py, the loop over `sample_schedulers`.
    """

    def first(self, predicted: np.ndarray, memory: Sequence[np.ndarray]) -> np.ndarray:
        return predicted


def log_ratio(sigma: float) -> float:
    """Gives the lambda of a noise level."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
