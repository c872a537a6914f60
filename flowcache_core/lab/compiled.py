"""What torch.compile gains: runs with the network's blocks compiled in alternation with runs as they are."""

import shutil
import statistics
import time
from dataclasses import dataclass, replace

from ..demo import load_network
from .methods import plain
from .runs import Clips, run
from .setups import Setup

COMPILERS = ("g++", "clang++", "cl")  # what torch.compile makes code for a processor with


@dataclass(frozen=True)
class Compiled:
    """Medians over pairs of runs: seconds as they are and compiled, of the first compiled one with its compilation, and
    the largest difference of a latent's numbers."""

    chunks: int
    seconds: float
    seconds_compiled: float
    seconds_first: float
    apart: float


def compiled_runs(clips: Clips, setup: Setup, pairs: int) -> Compiled | None:
    """Times a plain run of clips both ways; None where there is no C++ compiler."""
    if not any(map(shutil.which, COMPILERS)):
        return None
    backbone = load_network()
    backbone.compile()
    begun = time.perf_counter()
    after = replace(clips, backbone=backbone)
    run(plain(setup), setup, after)
    first = time.perf_counter() - begun
    found = [(run(plain(setup), setup, clips), run(plain(setup), setup, after)) for _ in range(pairs)]
    seconds, seconds_compiled = (statistics.median(run.seconds for run in runs) for runs in zip(*found, strict=True))
    apart = (found[0][0].latents - found[0][1].latents).abs().max().item()
    return Compiled(clips.chunks, seconds, seconds_compiled, first, apart)
