"""Reused steps without the guider: a call of it takes most of a millisecond only to learn that nothing is computed."""

from collections.abc import Callable, Iterator, Sequence

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...flowcache_core.engine.runner import Runner, Step
from ...flowcache_core.reuse.policies import Forecast
from ...flowcache_core.schedule import CLEAN

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

    def __call__(self, steps: Sequence[Step], ask: Callable[[Sequence[Step]], Iterator[Tensor]]) -> Iterator[Tensor]:
        """The clean estimates of a tick's steps; `ask` gets the guider's."""
        if not self.allowed:
            yield from ask(steps)
            return
        reused = [step.place.step != CLEAN and self.runner.reuses(step.place) for step in steps]
        answers = ask([step for step, known in zip(steps, reused, strict=True) if not known])
        for step, known in zip(steps, reused, strict=True):
            if known:
                yield self._foretold(step)
            else:
                clean = next(answers)
                self._remember(step, clean)
                yield clean
            if step.place.step == self.runner.schedule.steps_of(step.place.chunk) - 1:
                del self._forecasts[step.place.chunk]

    def _foretold(self, step: Step) -> Tensor:
        result = self._forecasts[step.place.chunk].at(step.place.step)
        return result if self.runner.held == "clean" else step.x - step.sigma * result

    def _remember(self, step: Step, clean: Tensor) -> None:
        if step.place.step == CLEAN:
            return
        forecast = self._forecasts.setdefault(step.place.chunk, Forecast(self.runner.order))
        forecast.add(step.place.step, clean if self.runner.held == "clean" else (step.x - clean) / step.sigma)
