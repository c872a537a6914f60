"""Reused steps without the guider: a call of it takes most of a millisecond only to learn that nothing is computed."""

from collections.abc import Callable

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..flowcache_core.reuse import Forecast
from ..flowcache_core.runner import Runner
from ..flowcache_core.schedule import CLEAN, Place

ASKED = ("__call__", "outer_predict_noise", "predict_noise")  # methods of a guider, one calls the next
FUNCTIONS = (  # of model options, which see or change what the guider gives at a step
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
)
WRAPPERS = (
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)
CHANGING = ("timestep_start", "timestep_end", "hooks", "control")  # of a condition: it is not the same at every step


def same_sum(guider, options: dict, own: str) -> bool:
    """Whether a guider gives the same weighted sum of the branches at every step: then what stands in for the branches
    of a reused step adds up to what stands in for the sum.

    Args:
        options: the model options of the run.
        own: key of our wrappers, which change no result.
    """
    kinds = type(guider), comfy.samplers.CFGGuider
    stock = all(len({getattr(kind, name, None) for kind in kinds}) == 1 for name in ASKED)
    conditions = [one for side in guider.conds.values() for one in side or []]
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return (
        stock
        and not any(options.get(name) for name in FUNCTIONS)
        and not any(one.get(name) is not None for one in conditions for name in CHANGING)
        and all(set(wrappers.get(kind, {})) <= {own} for kind in WRAPPERS)
    )


class Shortcut:
    """Asks the guider for the steps that are recomputed, and answers for it where a step is reused for sure.

    Args:
        runner: of the run.
        allowed: whether the guider's answers may be foretold, see `same_sum`.
    """

    def __init__(self, runner: Runner, allowed: bool):
        self.runner, self.allowed = runner, allowed and not runner.policy.watches
        self._forecasts: dict[int, Forecast] = {}

    def __call__(self, x: Tensor, sigma: float, place: Place, ask: Callable[[], Tensor]) -> Tensor:
        """The clean estimate of a step; `ask` gets the guider's."""
        if not self.allowed or place.step == CLEAN:
            return ask()
        holds_clean, chunk = self.runner.held == "clean", place.chunk
        if self.runner.reuses(place):
            result = self._forecasts[chunk].at(place.step)
            clean = result if holds_clean else x - sigma * result
        else:
            clean = ask()
            forecast = self._forecasts.setdefault(chunk, Forecast(self.runner.order))
            forecast.add(place.step, clean if holds_clean else (x - clean) / sigma)
        if place.step == self.runner.schedule.steps_of(chunk) - 1:
            del self._forecasts[chunk]
        return clean
