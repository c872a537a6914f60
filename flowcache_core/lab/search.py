"""Calibrates a model: which steps to recompute, and how alike the result is. `python -m flowcache_core.lab.search`.

On a few short clips of the model, lists of recomputed steps are improved by small moves; then every list is measured on
longer clips with other captions and noise, and the curve is written beside the model (`calibration`).
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ..calibration import Calibration, Measured, beside, reuse, save
from ..demo import NETWORK_FILE
from ..demo.model import load_network
from ..files import check_writable
from ..presets import OFF, Settings
from ..reuse import spread
from ..schedule import ChunkSchedule
from .likeness import likeness, pixels
from .runs import Clips, Method, run
from .setups import SETUPS, Setup

COUNTS = (4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30)  # recomputed steps of a chunk
SEARCH_CLIPS, SEARCH_CHUNKS = 4, 4
FINAL_CLIPS, FINAL_CHUNKS = 8, 16

Steps = tuple[int, ...]
Score = Callable[[Steps], float]  # dB, more is better


def moved(chosen: Steps, schedule: ChunkSchedule, draw: random.Random) -> Steps:
    """The list with one step moved a little, mostly with those that lie whole lags from it."""
    lag = schedule.lag or schedule.steps
    step, by = draw.choice(chosen[1:]), draw.choice((-4, -3, -2, -1, 1, 2, 3, 4))
    row = {other for other in chosen[1:] if (other - step) % lag == 0 and (other >= step or draw.random() < 0.5)}
    if draw.random() < 0.3:
        row = {step}
    new = {0} | (set(chosen) - row) | {other + by for other in row}
    sound = len(new) == len(chosen) and min(new) == 0 and max(new) < schedule.steps
    return tuple(sorted(new)) if sound else chosen


def improved(start: Steps, schedule: ChunkSchedule, score: Score, tries: int, draw: random.Random) -> Steps:
    """The best list found by so many moves from `start`."""
    best, reached, seen = start, score(start), {start}
    for _ in range(tries):
        other = next((new for new in (moved(best, schedule, draw) for _ in range(50)) if new not in seen), None)
        if other is None:
            break
        seen.add(other)
        if (found := score(other)) > reached:
            best, reached = other, found
    return best


def calibrate(
    setup: Setup,
    search_score: Score,
    final_score: Score,
    seconds: float,
    counts: Sequence[int] = COUNTS,
    told: Callable[[str], None] = lambda words: None,
) -> Calibration:
    """Searches for about so long, then measures. Longer lists change less and are given less time.

    Args:
        search_score, final_score: likeness to the plain run in dB of a list of recomputed steps; the first on few short
            clips, the second on what is reported.
    """
    schedule = ChunkSchedule(FINAL_CHUNKS, setup.steps, setup.lag)
    draw = random.Random(0)
    curve: list[Measured] = []
    begun = time.monotonic()
    for place, count in enumerate(counts):
        share = seconds * (place + 1) / len(counts)
        start = spread(schedule, count)
        took = time.monotonic()
        search_score(start)
        took = time.monotonic() - took
        left = share - (time.monotonic() - begun)
        best = improved(start, schedule, search_score, max(0, int(left / max(took, 1e-3)) - 1), draw)
        curve.append(Measured(best, 0.0))
        told(f"{count} steps: {best}")
    measured = [Measured(one.steps, round(final_score(one.steps), 2)) for one in curve]
    for one in measured:
        told(f"{len(one.steps)} steps: {one.psnr:.1f} dB")
    return Calibration(setup.steps, setup.lag, FINAL_CHUNKS, FINAL_CLIPS, tuple(measured))


def scored(setup: Setup, clips: Clips) -> Score:
    """Mean PSNR of clips to the plain run of them, from a list of recomputed steps."""
    plain: list[Tensor] = []

    def score(chosen: Steps) -> float:
        if not plain:
            plain.append(pixels(run(Method("plain", settings=OFF), setup, clips).latents))
        method = Method("searched", settings=Settings(reuse(chosen, setup.steps, setup.lag)))
        return likeness(pixels(run(method, setup, clips).latents), plain[0]).psnr

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--network", type=Path, default=NETWORK_FILE, help="of the demo's family (default: what ships)")
    parser.add_argument("--out", type=Path, help="the calibration (default: beside the network)")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of searching, before measuring (default: %(default)s)"
    )
    options = parser.parse_args()
    out = options.out or beside(options.network)
    check_writable(out)
    backbone, setup = load_network(options.network), SETUPS["magi"]
    search_clips = Clips.held_out(backbone, SEARCH_CLIPS, SEARCH_CHUNKS, seed=100)
    final_clips = Clips.held_out(backbone, FINAL_CLIPS, FINAL_CHUNKS, seed=200)
    made = calibrate(
        setup, scored(setup, search_clips), scored(setup, final_clips), 60 * options.minutes,
        told=lambda words: print(words, flush=True),
    )  # fmt: skip
    save(made, out)
    print(f"{out}: {len(made.curve)} settings")


if __name__ == "__main__":
    main()
