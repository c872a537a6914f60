"""What is compared: every method over a sweep of its setting, so that each is a curve."""

from collections.abc import Iterator

from ..calibration import recomputing
from ..multistep import DPM2M, UniPC
from ..presets import DEFAULT_PRESET, PRESETS, PolicyName, ReuseSettings, Settings
from ..solvers import Euler, SolverFactory
from .adams_bashforth import AdamsBashforth2
from .easycache import easycache
from .runs import Method
from .setups import Setup

OURS, PLAIN, HISTORY = "ours", "plain", "history only"
FEWER = "fewer steps"
SOLVERS: dict[str, SolverFactory] = {"AB2": AdamsBashforth2, "DPM++ 2M": DPM2M, "UniPC": UniPC, "Euler": Euler}
FORECASTS = ("held", "linear", "quadratic")

TIMED = 3  # of our settings
LONG_STEPS = 6  # recomputed of a chunk, where many chunks are made

# Recomputed steps of a chunk, for ours; steps of fewer steps; distances of periodic; thresholds of the rules that watch
# the input, which lie between 2x and 8x on the demo model.
OUR_STEPS = {"magi": (15, 9, 6, 30, 20), "skyreels": (7, 5, 4, 15, 10, 25), "causal": (3, 2)}
FEWER_STEPS = {"magi": (16, 8, 32), "skyreels": (20, 10, 30), "causal": (3, 2)}
DISTANCES = {"magi": (8, 4, 16), "skyreels": (5, 10), "causal": ()}
THRESHOLDS = {
    "FlowCache's rule": {"magi": (0.05, 0.2, 0.1), "skyreels": (0.05, 0.2, 0.1), "causal": (0.1,)},
    "TeaCache's rule": {"magi": (0.05, 0.2, 0.1), "skyreels": (0.05, 0.2, 0.1), "causal": ()},
    "EasyCache's rule": {"magi": (0.05, 0.4, 0.2), "skyreels": (0.05, 0.4, 0.2), "causal": ()},
}


def plain(setup: Setup) -> Method:
    """As its makers run it, unaccelerated."""
    return Method(PLAIN, "every step", window=setup.window)


def history_only() -> Method:
    """Keys and values kept, every step recomputed: what the plain run gives, with less work where it keeps nothing."""
    return Method(HISTORY, "every step")


def converged(setup: Setup) -> Method:
    """Twice the steps of a second-order solver."""
    return Method("converged", f"{2 * setup.steps} steps", steps=2 * setup.steps, solver=AdamsBashforth2)


def ours(setup: Setup) -> list[Method]:
    """FlowCache with so many recomputed steps a chunk, the most wanted first."""
    return [
        Method(OURS, f"{count} steps", Settings(recomputing(count, setup.steps, setup.lag)), timed=place < TIMED)
        for place, count in enumerate(OUR_STEPS[setup.name])
    ]


def default(setup: Setup) -> Method:
    """What FlowCache does unless told otherwise."""
    return Method(OURS, DEFAULT_PRESET, PRESETS[DEFAULT_PRESET])


def sparing(setup: Setup) -> Method:
    """FlowCache with few recomputed steps, for long runs."""
    return next(method for method in ours(setup) if method.setting == f"{LONG_STEPS} steps")


def peers(setup: Setup) -> Iterator[Method]:
    """Everything else, the first setting of every method first."""
    sweeps = [*_fewer_steps(setup), *_rules(setup), *_periodic(setup)]
    for place in range(max(len(sweep) for sweep in sweeps)):
        for sweep in sweeps:
            yield from sweep[place : place + 1]


def _fewer_steps(setup: Setup) -> list[list[Method]]:
    solvers = SOLVERS if setup.converges else {"": setup.solver}
    return [
        [
            Method(f"{FEWER}, {name}" if name else FEWER, f"{steps} steps", steps=steps, solver=solver)
            for steps in FEWER_STEPS[setup.name]
        ]
        for name, solver in solvers.items()
    ]


def _rules(setup: Setup) -> list[list[Method]]:
    warmup = min(5, setup.steps // 2)
    sweeps = []
    for name, thresholds in THRESHOLDS.items():
        sweep = []
        for threshold in thresholds[setup.name]:
            setting = f"threshold {threshold:g}"
            if name.startswith("EasyCache"):
                sweep.append(
                    Method(name, setting, Settings(ReuseSettings(order=0, correct=False)), runner=easycache(threshold))
                )
                continue
            policy: PolicyName = "flowcache" if name.startswith("FlowCache") else "teacache"
            reuse = ReuseSettings(policy, threshold=threshold, warmup=warmup, order=0, correct=False)
            sweep.append(Method(name, setting, Settings(reuse)))
        sweeps.append(sweep)
    return sweeps


def _periodic(setup: Setup) -> list[list[Method]]:
    return [
        [
            Method(
                f"periodic, {name}",
                f"every {every}th",
                Settings(ReuseSettings("even", every=every, least=1, order=order, correct=False)),
            )
            for every in DISTANCES[setup.name]
        ]
        for order, name in enumerate(FORECASTS)
    ]
