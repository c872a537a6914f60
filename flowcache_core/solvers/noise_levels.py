"""The noise levels of each family: sigmas [steps + 1], falling from noise (near 1) to clean (0).

A network of the Wan layout is told time-step 1000 x sigma.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TRAINED_LEVELS = 1000

# Denoising lists of the few-step models, as time-steps before warping.
SELF_FORCING = (1000, 750, 500, 250)  # Self-Forcing and Causal-Forcing: configs/*_dmd*.yaml
CAUSAL_FORCING_2_STEPS = (1000, 500)  # causal_forcing_dmd_framewise_2step.yaml; its first chunk takes SELF_FORCING
CAUSAL_FORCING_1_STEP = (1000,)  # causal_forcing_dmd_framewise_1step.yaml; likewise
ROLLING_FORCING = (1000, 800, 600, 400, 200)  # configs/rolling_forcing_dmd.yaml
CAUSVID_3_STEPS = (1000, 757, 522)  # configs/wan_causal_dmd.yaml, not warped
CAUSVID_4_STEPS = (1000, 750, 500, 250)  # configs/wan_causal_dmd_warp_4step_cfg2.yaml, warped


def row_levels(sigma: float, x: Tensor) -> Tensor:
    """Gives one noise level for each row of x [B, ...], made on its device."""
    return torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)


def shifted(sigma: float, shift: float) -> float:
    """Moves a noise level towards noise: s sigma / (1 + (s - 1) sigma). SD3, arXiv 2403.03206, equation 23."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def linear(steps: int, shift: float = 1.0, first: float = 1.0) -> list[float]:
    """Gives evenly spaced levels from `first` to 0, then shifted."""
    return [shifted(first * (steps - step) / steps, shift) for step in range(steps + 1)]


def skyreels(steps: int = 50, shift: float = 8.0) -> list[float]:
    """Gives SkyReels-V2's levels: its scheduler begins at 0.999, the noisiest level that it was trained on.

    The network is told the time-step cut to an integer (`models.wan`); the solver uses the level itself.
    Source: skyreels_v2_infer/scheduler/fm_solvers_unipc.py, set_timesteps.
    """
    return linear(steps, shift, first=1.0 - 1.0 / TRAINED_LEVELS)


def warped(timesteps: Sequence[int], shift: float = 5.0) -> list[float]:
    """Gives the levels of a denoising list of a few-step model.

    Self-Forcing and its kin at shift 5: time-steps 1000, 937.5, 833.33, 625. CausVid's 4-step variant at shift 8.
    Source: warp_denoising_step in Self-Forcing's pipeline/causal_inference.py.
    """
    return [shifted(timestep / TRAINED_LEVELS, shift) for timestep in timesteps] + [0.0]


def unwarped(timesteps: Sequence[int]) -> list[float]:
    """Gives the levels of a denoising list that is taken as it is: CausVid's 3 steps."""
    return [timestep / TRAINED_LEVELS for timestep in timesteps] + [0.0]


def nearest_trained(sigmas: Sequence[float], shift: float = 8.0) -> list[float]:
    """Replaces each level by the nearest of the 1,000 shifted ones of training, 0 kept.

    CausVid's solver looks its levels up so, while its network is told the time-step itself: 0.757 becomes 0.7567,
    0.522 becomes 0.5219. Source: add_noise and _convert_flow_pred_to_x0 in its wan_wrapper.py and scheduler.py.
    """
    trained = linear(TRAINED_LEVELS, shift)[:-1]
    return [min(trained, key=lambda level: abs(level - sigma)) if sigma else 0.0 for sigma in sigmas]


def magi(steps: int = 64, shift: float = 3.0) -> list[float]:
    """Gives MAGI-1's levels: its time is spaced as a square, t = (i / steps)^2 with 0 = noise, then shifted.

    Source: MAGI-1, inference/pipeline/video_generate.py (square, sd3 transform); a level is 1 - t.
    """
    return [shifted(1.0 - (step / steps) ** 2, shift) for step in range(steps + 1)]
