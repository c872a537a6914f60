"""What is compared: every method over a sweep of its setting, so that each is a curve."""

from ..backbones.skyreels import POLYNOMIAL_1_3B
from ..multistep import DPM2M, UniPC
from ..presets import OFF, ReuseSettings, Settings
from ..reuse import spread
from ..schedule import ChunkSchedule
from ..solvers import Euler, SolverFactory
from .adams_bashforth import AdamsBashforth2
from .easycache import easycache
from .runs import Method
from .setups import Setup

OURS, PLAIN, HISTORY = "ours", "plain", "history only"
SOLVERS: dict[str, SolverFactory] = {"AB2": AdamsBashforth2, "DPM++ 2M": DPM2M, "UniPC": UniPC, "Euler": Euler}
FORECASTS = ("held", "linear", "quadratic")

# Recomputed steps of a chunk, for ours; steps of fewer steps; distances of periodic; thresholds of the rules that watch
# the input, chosen to lie between 2x and 8x on the demo model.
OUR_STEPS = {"magi": (5, 6, 7, 8, 10, 12, 15, 20, 30), "skyreels": (7, 9, 11, 15, 20, 30), "causal": (2, 3)}
FEWER_STEPS = {"magi": (16, 8, 32, 12), "skyreels": (20, 10, 30), "causal": (3, 2, 1)}
DISTANCES = {"magi": (8, 4, 16, 2), "skyreels": (5, 10), "causal": ()}
THRESHOLDS = {
    "FlowCache": {"magi": (0.02, 0.04, 0.01), "skyreels": (0.02, 0.04, 0.01), "causal": (0.1,)},
    "TeaCache": {"magi": (0.02, 0.04, 0.01), "skyreels": (0.02, 0.04, 0.01), "causal": ()},
    "EasyCache": {"magi": (0.05, 0.1, 0.02), "skyreels": (0.05, 0.1, 0.02), "causal": ()},
}


def plain(setup: Setup) -> Method:
    """As its makers run it, unaccelerated."""
    return Method(PLAIN, "every step", window=setup.window)
