"""Measures FlowCache and its peers on the same clips: `python -m flowcache_core.lab.bench` (`make bench`).

Writes report.json, table.md and the plots. Points come in order of importance, and those for which the time does not
reach are left out and named in the report.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..demo import NETWORK_FILE
from ..demo.model import decode, load_network
from ..demo.train_network import FRAMES_PER_CHUNK
from ..errors import UserError
from ..files import check_writable, write_whole
from ..metrics import psnr
from . import charts, compression_cost, process
from .likeness import pixels
from .long_run import long_run
from .methods import HISTORY, OURS, PLAIN, compared, converged, default, plain
from .points import Point, References, measure
from .runs import Clips, Method, Outcome, plain_forwards, run
from .setups import SETUPS, Setup
from .short_history import short_history
from .table import table


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        clips, chunks: of the likeness curves.
        pairs: alternating runs for time.
        every: only every n-th setting of a sweep.
        long_chunks: of the long run.
        short_clips, short_chunks: of the comparison of short histories.
        tokens: of clean history, for the cost of cutting it.
        minutes: that the whole may take.
    """

    clips: int = 8
    chunks: int = 16
    pairs: int = 5
    every: int = 1
    long_chunks: int = 1000
    short_clips: int = 8
    short_chunks: int = 64
    tokens: int = 8192
    minutes: float = 24.0


SMOKE = Size(clips=2, chunks=4, pairs=1, every=3, long_chunks=60, short_clips=1, short_chunks=8, tokens=1024, minutes=2.7)


@dataclass
class Bench:
    """Collects the report.

    Attributes:
        size: how much.
        network: file of the demo's family.
        begun: when the clock was started.
    """

    size: Size
    network: Path = NETWORK_FILE
    begun: float = field(default_factory=time.monotonic)
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    checks: dict = field(default_factory=dict)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60
