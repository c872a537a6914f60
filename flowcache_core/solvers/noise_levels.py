"""The noise levels of each family: sigmas [steps + 1], falling from noise (near 1) to clean (0).

A network of the Wan layout is told time-step 1000 x sigma.
"""

from collections.abc import Sequence

TRAINED_LEVELS = 1000
NEARLY_CLEAN = 1e-9  # stands for a level of 0 that is a step of its own
WHOLE = 1e-6  # of a step: so far from a whole number is one

CAUSVID_3_STEPS = (1.0, 0.757, 0.522, 0.0)  # configs/wan_causal_dmd.yaml, neither even nor shifted


def shifted(sigma: float, shift: float) -> float:
    """Moves a noise level towards noise: s sigma / (1 + (s - 1) sigma). SD3, arXiv 2403.03206, equation 23."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def linear(steps: int, shift: float = 1.0, first: float = 1.0) -> list[float]:
    """Gives evenly spaced levels from `first` to 0, then shifted.

    The few-step models name theirs as time-steps, 1000 750 500 250 of Self-Forcing, and shift ("warp") them by 5; those
    of CausVid's 4-step variant by 8. Source: warp_denoising_step in Self-Forcing's pipeline/causal_inference.py.
    """
    return [shifted(first * (steps - step) / steps, shift) for step in range(steps + 1)]


def skyreels(steps: int = 50, shift: float = 8.0) -> list[float]:
    """Gives SkyReels-V2's levels: its scheduler begins at 0.999, the noisiest level that it was trained on.

    The network is told the time-step cut to an integer (`models.wan`); the solver uses the level itself.
    Source: skyreels_v2_infer/scheduler/fm_solvers_unipc.py, set_timesteps.
    """
    return linear(steps, shift, first=1.0 - 1.0 / TRAINED_LEVELS)


def nearest_trained(sigmas: Sequence[float], shift: float = 8.0) -> list[float]:
    """Replaces each level by the nearest of the 1,000 shifted ones of training, 0 kept.

    CausVid's solver looks its levels up so, while its network is told the time-step itself: 0.757 becomes 0.7567,
    0.522 becomes 0.5219. Source: add_noise and _convert_flow_pred_to_x0 in its wan_wrapper.py and scheduler.py.
    """
    trained = linear(TRAINED_LEVELS, shift)[:-1]
    return [min(trained, key=lambda level: abs(level - sigma)) if sigma else 0.0 for sigma in sigmas]


def krea(steps: int = 5, shift: float = 5.0) -> list[float]:
    """Gives Krea Realtime's levels: evenly spaced thousandths down to 0, then shifted. The last of them is a step as
    well: its network is told 0 there, while its solver takes the least level of training (`nearest_trained`).

    Source: v2v.py, get_denoising_schedule; release_server.py, generate_block_internal.
    """
    spaces = max(1, steps - 1)
    even = [TRAINED_LEVELS * (spaces - step) // spaces / TRAINED_LEVELS for step in range(steps)]
    return [*(shifted(level, shift) or NEARLY_CLEAN for level in even), 0.0]


def remaining(levels: Sequence[float], strength: float) -> list[float]:
    """Gives the levels of the last `strength` of a schedule's steps, [steps left + 1].

    Args:
        levels: of all steps, [steps + 1].
        strength: above 0 to 1. Where it is no whole number of steps, the first level lies between two of the
            schedule's, as far as the strength does.
    """
    steps = len(levels) - 1
    begun = steps * (1.0 - strength)
    step = round(begun)
    if abs(begun - step) < WHOLE:
        return list(levels[min(step, steps - 1) :])
    step = int(begun)
    share = begun - step
    return [(1.0 - share) * levels[step] + share * levels[step + 1], *levels[step + 1 :]]


def magi(steps: int = 64, shift: float = 3.0) -> list[float]:
    """Gives MAGI-1's levels: its time is spaced as a square, t = (i / steps)^2 with 0 = noise, then shifted.

    Source: MAGI-1, inference/pipeline/video_generate.py (square, sd3 transform); a level is 1 - t.
    """
    return [shifted(1.0 - (step / steps) ** 2, shift) for step in range(steps + 1)]
