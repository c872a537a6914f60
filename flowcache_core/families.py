"""What each family of models is run with, where the user does not say otherwise, and where each number comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import noise_levels
from .errors import UserError
from .multistep import UniPC
from .solvers import Euler, Renoise, SolverFactory

SolverName = Literal["euler", "renoise", "unipc"]
SOLVERS: dict[str, SolverFactory] = {
    "euler": Euler,
    "renoise": Renoise,
    "unipc": UniPC,
}


@dataclass(frozen=True)
class Family:
    """Recommended settings of a family.

    Attributes:
        steps, lag: of its schedule; see `schedule.ChunkSchedule`.
        chunk_frames: latent frames of a chunk.
        solver: a key of `SOLVERS`.
        levels: noise levels from the number of steps.
        guidance: scale of classifier-free guidance.
        size: width and height in pixels.
        source: where the numbers come from.
    """

    steps: int
    lag: int
    chunk_frames: int
    solver: SolverName
    levels: Callable[[int], list[float]]
    guidance: float
    size: tuple[int, int]
    source: str


FAMILIES: dict[str, Family] = {
    "demo": Family(64, 16, 3, "euler", noise_levels.magi, 1.0, (64, 64), "the project's own trials"),
    "causal": Family(
        4, 4, 3, "renoise", lambda steps: noise_levels.linear(steps, 5.0), 1.0, (832, 480),
        "Self-Forcing, configs/self_forcing_dmd.yaml; Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml",
    ),
    "skyreels": Family(
        50, 5, 5, "unipc", noise_levels.skyreels, 6.0, (960, 544), "SkyReels-V2, README (asynchronous inference)"
    ),
    "wan": Family(50, 50, 3, "unipc", lambda steps: noise_levels.linear(steps, 8.0), 6.0, (832, 480), "Wan 2.1, README"),
}  # fmt: skip


def family(name: str) -> Family:
    """A family's settings.

    Raises:
        UserError: it cannot be run yet.
    """
    if name not in FAMILIES:
        raise UserError(f"The family '{name}' is not supported here; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]
