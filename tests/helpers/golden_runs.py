"""What the comparisons with upstream's own runs have in common."""

import torch

from flowcache_core.engine.loop import Engine
from flowcache_core.models.rotary import Rotary
from tests.helpers.magi_weights import normal


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.float() - expected).norm() / expected.norm()).item()


class StretchedRotary(Rotary):
    """Wrong on purpose: frames twice as far apart."""

    def axes(self, frames, rows, columns):
        return super().axes(2 * frames, rows, columns)


def frames_of(name: str, frames: int) -> torch.Tensor:
    """A named latent [1, C, frames, H, W]; upstream draws it frame by frame."""
    return normal(name, (frames, 16, 4, 6)).transpose(0, 1)[None]


def latents_seen(engine: Engine) -> list[torch.Tensor]:
    """What every forward of a run is given, chunk by chunk, in order; clean passes are told apart by nothing.

    Where a clean pass goes along with the next forward, it comes before that one's steps.
    """
    seen, guidance = [], engine.forward.guidance
    ask = guidance.velocities
    guidance.velocities = lambda steps, network: seen.extend(step.x for step in steps) or ask(steps, network)
    return seen
