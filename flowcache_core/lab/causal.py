"""Runs over a history whose forward may be another than the engine's own."""

from typing import Protocol

from ..engine.build import RunSettings, plan_run
from ..engine.causal import CausalForward
from ..engine.loop import Engine
from ..report import Report
from ..reuse.policies import Policy, aligned


class MakeForward(Protocol):
    """Makes a forward from what `CausalForward` is made from."""

    def __call__(self, *what, **more) -> CausalForward: ...


def causal_forward(run: RunSettings, policy: Policy, make: MakeForward = CausalForward) -> CausalForward:
    """Makes a run's forward, with its memory planned."""
    return make(
        run.backbone,
        run.guidance,
        plan_run(run, policy),
        run.settings,
        Report(run.schedule, run.label),
        aligned=aligned(policy, run.schedule),
        dtype=run.dtype,
        device=run.device,
        attention=run.attention,
        order=run.settings.between.order_for(policy, run.schedule.steps),
    )


def causal_engine(run: RunSettings, make: MakeForward = CausalForward) -> Engine:
    """Makes a run with a forward of one's own."""
    policy = run.settings.reuse.policy(run.schedule)
    return Engine(causal_forward(run, policy, make), run.schedule, policy, run.settings.between, run.sampling)
