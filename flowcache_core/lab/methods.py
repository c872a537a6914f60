"""What is compared: every method over a sweep of its setting, so that each is a curve."""

from collections.abc import Iterator
from functools import partial
from typing import Literal

from ..models.presets import DEFAULT_PRESET, PRESETS, recomputing
from ..settings import HELD, Between, Drift, Every, Fixed, Reuse, Settings
from ..solvers.multistep import DPM2M, UniPC
from ..solvers.one_step import Euler, SolverFactory
from .adams_bashforth import AdamsBashforth2
from .easycache import easycache_engine
from .forecasts import forecasting_engine, hermite, taylor
from .magcache import magcache_engine
from .motioncache import motioncache_engine
from .runs import Method
from .setups import Setup

OURS, PLAIN, HISTORY = "ours", "plain", "history only"
CACHE_DIT = "cache-dit"  # the package, see `packages`
FEWER, EVERY = "fewer steps", "every step"
SOLVERS: dict[str, SolverFactory] = {"AB2": AdamsBashforth2, "DPM++ 2M": DPM2M, "UniPC": UniPC, "Euler": Euler}
FORECASTS = ("held", "linear", "quadratic")

CONVERGED = 8  # times the plain run's steps
TIMED = 4  # of our settings
LONG_STEPS = 6  # recomputed of a chunk, where many chunks are made

# Recomputed steps of a chunk, for ours; steps of fewer steps; distances of periodic; thresholds of the rules that watch
# the input, which lie between 2x and 8x on the demo model; MagCache's with the most steps skipped in a row. The most
# telling setting of each comes first.
OUR_STEPS = {"magi": (9, 15, 5, 6, 12, 30, 20), "skyreels": (9, 7, 12, 5, 8, 6, 14, 20, 30), "causal": (3, 2)}
FEWER_STEPS = {"magi": (16, 8, 30), "skyreels": (20, 15, 30), "causal": (3, 2)}
DISTANCES = {"magi": (8, 4), "skyreels": (5,), "causal": ()}
THRESHOLDS = {
    "FlowCache's rule": {"magi": (0.1, 0.05, 0.2), "skyreels": (0.03, 0.06), "causal": (0.1,)},
    "TeaCache's rule": {"magi": (0.1, 0.05, 0.2), "skyreels": (0.03, 0.06), "causal": ()},
    "EasyCache's rule": {"magi": (0.1, 0.05, 0.2), "skyreels": (0.05, 0.1), "causal": ()},
    "MotionCache's rule": {"magi": (0.1, 0.05, 0.2), "skyreels": (0.03, 0.06), "causal": ()},
}
BY_FORWARD = {"EasyCache's rule": easycache_engine, "MotionCache's rule": motioncache_engine}
PUBLISHED_FORECASTS = {"TaylorSeer": taylor, "HiCache": hermite}
MAGCACHE = "MagCache's rule"
MAGNITUDES = {"magi": ((0.24, 6), (0.06, 4), (1.0, 10)), "skyreels": ((0.24, 6), (0.06, 4), (1.0, 10)), "causal": ()}
PUBLISHED = (*THRESHOLDS, MAGCACHE, *PUBLISHED_FORECASTS)


def plain(setup: Setup) -> Method:
    """As its makers run it, unaccelerated."""
    return Method(PLAIN, EVERY, window=setup.window)


def history_only() -> Method:
    """Keys and values kept, every step recomputed: what the plain run gives, with less work where it keeps nothing."""
    return Method(HISTORY, EVERY)


def converged(setup: Setup) -> Method:
    """Eight times the steps of the plain run, with its solver; keys and values are kept, which gives the same."""
    steps = CONVERGED * setup.steps
    return Method("converged", f"{steps} steps", steps=steps)


def ours(setup: Setup) -> list[Method]:
    """FlowCache with so many recomputed steps a chunk, the most telling first."""
    return [
        Method(OURS, f"{count} steps", Settings(_recomputing(count, setup)), timed=place < TIMED)
        for place, count in enumerate(OUR_STEPS[setup.name])
    ]


def _recomputing(count: int, setup: Setup) -> Reuse:
    """Where every step adds fresh noise, the first ones and the last: no line can be put through such steps, and what
    the last one makes is not improved by any other."""
    if setup.converges:
        return recomputing(count, setup.steps, setup.lag)
    return Fixed((*range(count - 1), setup.steps - 1))


def default(setup: Setup) -> Method:
    """What FlowCache does unless told otherwise."""
    return Method(OURS, DEFAULT_PRESET, PRESETS[DEFAULT_PRESET])


def sparing(setup: Setup) -> Method:
    """FlowCache with few recomputed steps, for long runs."""
    return next(method for method in ours(setup) if method.setting == f"{LONG_STEPS} steps")


def peers(setup: Setup, settings: int) -> Iterator[Method]:
    """Everything else, so many settings of each: the first of every method, then what says most."""
    published = [*_rules(setup), _magnitudes(setup), *_published_forecasts(setup), *_fewer_steps(setup)]
    periodic = _periodic(setup)
    for sweep in [*published, *periodic]:
        yield from sweep[:1]
    for sweeps in (published, periodic):
        for place in range(1, settings):
            for sweep in sweeps:
                yield from sweep[place : place + 1]


def _fewer_steps(setup: Setup) -> list[list[Method]]:
    """Where steps are few, every single one counts: those runs alternate with the plain one too."""
    if not setup.converges:
        solvers, timed = {FEWER: setup.solver}, True
    else:
        solvers, timed = {f"{FEWER}, {name}": solver for name, solver in SOLVERS.items()}, False
    return [
        [Method(name, f"{steps} steps", steps=steps, solver=solver, timed=timed) for steps in FEWER_STEPS[setup.name]]
        for name, solver in solvers.items()
    ]


def _published_forecasts(setup: Setup) -> list[list[Method]]:
    """Every so manieth step recomputed, the others forecast by two differences."""
    second = Between(2, correct=False)
    return [
        [
            Method(
                name,
                f"every {every}th",
                Settings(Every(every), second),
                build=partial(forecasting_engine, weights=weights),
            )
            for every in DISTANCES[setup.name]
        ]
        for name, weights in PUBLISHED_FORECASTS.items()
    ]


def _magnitudes(setup: Setup) -> list[Method]:
    """MagCache's rule; what is held is as for the other rules."""
    held = Settings(Drift(0.0, holds=_holds(setup)), HELD)
    return [
        Method(
            MAGCACHE,
            f"threshold {threshold:g}",
            held,
            build=partial(magcache_engine, setup=setup, threshold=threshold, most=most),
        )
        for threshold, most in MAGNITUDES[setup.name]
    ]


def _holds(setup: Setup) -> Literal["velocity", "residual"]:
    return "residual" if setup.name == "skyreels" else "velocity"


def _rules(setup: Setup) -> list[list[Method]]:
    """Published rules with their warm-up of 5 steps. FlowCache's version for SkyReels-V2 holds the blocks' residual and
    recomputes the last step; the time embedding that it watches there, through a polynomial fitted to that model, has
    no counterpart here: the latent's embedding is watched, as in its version for MAGI-1."""
    warmup, as_skyreels = min(5, setup.steps // 2), setup.name == "skyreels"
    sweeps = []
    for name, thresholds in THRESHOLDS.items():
        sweep = []
        for threshold in thresholds[setup.name]:
            setting = f"threshold {threshold:g}"
            if name in BY_FORWARD:
                sweep.append(Method(name, setting, build=partial(BY_FORWARD[name], threshold=threshold)))
                continue
            reuse = Drift(
                threshold,
                warmup,
                last=as_skyreels,
                whole_window=name.startswith("TeaCache"),
                holds=_holds(setup),
            )
            sweep.append(Method(name, setting, Settings(reuse, HELD)))
        sweeps.append(sweep)
    return sweeps


def _periodic(setup: Setup) -> list[list[Method]]:
    return [
        [
            Method(
                f"periodic, {name}",
                f"every {every}th",
                Settings(Every(every), Between(order, correct=False)),
            )
            for every in DISTANCES[setup.name]
        ]
        for order, name in enumerate(FORECASTS)
    ]
