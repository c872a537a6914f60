"""How a run looks and moves beside another of the same clips: what likeness of pixels does not tell."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from .likeness import Spread
from .motion import border_jumps, colour_drift, flows, motion_error
from .perceptual import st_lpips, vmaf

VMAF_CLIPS = 4  # the first of them; it takes a second a clip


@dataclass(frozen=True)
class Looks:
    """A figure a clip. Of a run beside itself they say what the others are to be read against.

    Attributes:
        st_lpips: distance to the other run, 0 where equal; None without its package.
        vmaf: of the first clips, against the other run; None without its package.
        motion: optical flow's distance to the other run's, pixels a frame, where something moves.
        jumps: change at the borders of chunks over that between other frames.
        colour: drift of the mean colour from the first to the last chunk, 255ths.
    """

    st_lpips: Spread | None
    vmaf: Spread | None
    motion: Spread
    jumps: Spread
    colour: Spread

    def as_dict(self) -> dict:
        return {name: spread and spread.as_dict() for name, spread in vars(self).items()}


@dataclass(frozen=True)
class Seen:
    """A run that others are compared with: its pixels [clips, 3, T, H, W] in [-1, 1]."""

    pixels: Tensor = field(repr=False)

    @cached_property
    def flows(self) -> list[np.ndarray]:
        return flows(self.pixels)

    def looks(self, made: Tensor) -> Looks:
        """Compares the pixels of another run of the same clips, or this one's own."""
        moved = self.flows if made is self.pixels else flows(made)
        return Looks(
            st_lpips(made, self.pixels),
            vmaf(made[:VMAF_CLIPS], self.pixels[:VMAF_CLIPS]),
            motion_error(moved, self.flows),
            border_jumps(made),
            colour_drift(made),
        )
