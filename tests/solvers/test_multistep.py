"""UniPC and 2M against upstream's scheduler (tests/golden/README.md), and what their order promises."""

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.solvers.multistep import DPM2M, UniPC
from flowcache_core.solvers.noise_levels import linear, skyreels
from flowcache_core.solvers.one_step import Euler
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_weights import normal
from tests.helpers.paths import GOLDEN_FOLDER

GOLDEN = load_file(GOLDEN_FOLDER / "unipc.safetensors")
SHIFTS = {50: 8.0, 10: 5.0, 2: 3.0, 1: 8.0}


@pytest.mark.parametrize("steps", SHIFTS)
def test_skyreels_levels(steps):
    sigmas = skyreels(steps, SHIFTS[steps])
    assert torch.allclose(torch.tensor(sigmas), GOLDEN[f"unipc.{steps}.sigmas"], atol=1e-7)
    assert [int(1000 * sigma) for sigma in sigmas[:-1]] == GOLDEN[f"unipc.{steps}.timesteps"].tolist()


@pytest.mark.parametrize(
    ("name", "solver", "steps"), [*(("unipc", UniPC, n) for n in SHIFTS), ("predictor", DPM2M, 10)]
)
def test_golden(name, solver, steps):
    x, velocities = normal("x", (1, 2, 3, 4, 4)), normal(f"velocity{steps}", (steps, 1, 2, 3, 4, 4))
    chunk = solver(skyreels(steps, SHIFTS[steps]))
    golden = GOLDEN[f"{name}.{steps}.latents"]
    for step in range(steps):
        x = chunk.step(x, velocities[step] + 0.3 * x, step)
        assert relative_error(x, golden[step]) < 1e-5
    if steps > 2:  # the golden would notice another solver
        other = DPM2M if solver is UniPC else UniPC
        x, chunk = normal("x", (1, 2, 3, 4, 4)), other(skyreels(steps, SHIFTS[steps]))
        for step in range(steps):
            x = chunk.step(x, velocities[step] + 0.3 * x, step)
        assert relative_error(x, golden[-1]) > 1e-3


def gaussian_flow(solver, sigmas: list[float]) -> float:
    """Where a solver takes x = 1 at the first level, for clean data drawn from a Gaussian of deviation 0.5."""
    x = torch.ones((), dtype=torch.float64)
    chunk = solver(sigmas, None)
    for step, sigma in enumerate(sigmas[:-1]):
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        x = chunk.step(x, x * (sigma - (1 - sigma) * 0.25) / variance, step)
    return x.item()


@pytest.mark.parametrize("solver", [DPM2M, UniPC])
def test_second_order(solver):
    """Halving the step size takes at least 3.5 times off the error; Euler only 2."""

    def error(solver, steps):
        sigmas = [0.95 - 0.85 * step / steps for step in range(steps + 1)]
        exact = ((0.9**2 * 0.25 + 0.1**2) / (0.05**2 * 0.25 + 0.95**2)) ** 0.5
        return abs(gaussian_flow(solver, sigmas) - exact)

    assert error(solver, 40) / error(solver, 80) > 3.5
    assert error(Euler, 40) / error(Euler, 80) < 2.2
    assert error(solver, 40) < 0.1 * error(Euler, 40)


@pytest.mark.parametrize("solver", [DPM2M, UniPC])
def test_from_pure_noise(solver):
    """Levels may begin at 1, where lambda is infinite."""
    assert abs(gaussian_flow(solver, linear(200)) - 0.5) < 5e-3


@pytest.mark.parametrize("solver", [DPM2M, UniPC])
def test_straight_flow_is_exact(solver):
    noise, clean = normal("noise", (1, 1, 1, 4, 4)), normal("clean", (1, 1, 1, 4, 4))
    sigmas = skyreels(7, 3.0)
    x, chunk = torch.lerp(clean, noise, sigmas[0]), solver(sigmas)
    for step in range(7):
        x = chunk.step(x, noise - clean, step)
        assert torch.allclose(x, torch.lerp(clean, noise, sigmas[step + 1]), atol=1e-5)
