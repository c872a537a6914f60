"""Adams-Bashforth of order 2: the plainest second-order multistep solver, for `fewer steps` and for converged runs."""

import numpy as np

from ..solvers.one_step import Linear


class AdamsBashforth2(Linear):
    """x moves along the velocity extrapolated, through the last two, to the middle of the step."""

    def weights(self, step: int, held: int, provisional: bool = False) -> np.ndarray:
        x, *last, velocity = np.eye(held + 2)
        stride = self.sigmas[step + 1] - self.sigmas[step]
        middle = velocity
        if last:
            middle = velocity + (velocity - last[0]) * (0.5 * stride / (self.sigmas[step] - self.sigmas[step - 1]))
        return np.stack([x + stride * middle, velocity])
