"""Calibrates a model: which steps to recompute, and how alike the result is. `python -m flowcache_core.lab.search`.

On a few short clips of the model, lists of recomputed steps are improved by small moves; then every list is measured on
longer clips with other captions and noise, and the curve is written beside the model (`calibration`).
"""

import argparse
from pathlib import Path

from torch import Tensor

from ..demo import NETWORK_FILE
from ..demo.model import load_network
from ..models.presets import OFF, Settings
from ..reuse.calibration import SHIPPED, beside, load, reuse, save
from ..schedule import ChunkSchedule
from ..storage.files import check_writable
from .likeness import decibels, pixels
from .placement import Score, Steps, calibrate
from .runs import Clips, Method, run
from .setups import SETUPS, Setup

SEARCH_CLIPS, SEARCH_CHUNKS = 4, 4
FINAL_CLIPS, FINAL_CHUNKS = 24, 16  # clips differ by 12 dB (standard deviation at `balanced`): 8 tell too little


def scored(setup: Setup, clips: Clips) -> Score:
    """Mean PSNR of clips to the plain run of them, from a list of recomputed steps."""
    plain: list[Tensor] = []

    def score(chosen: Steps) -> float:
        if not plain:
            plain.append(pixels(run(Method("plain", settings=OFF), setup, clips).latents))
        method = Method("searched", settings=Settings(reuse(chosen, setup.steps, setup.lag)))
        return decibels(pixels(run(method, setup, clips).latents), plain[0])

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(".")[0])
    parser.add_argument("--network", type=Path, default=NETWORK_FILE, help="of the demo's family (default: what ships)")
    parser.add_argument("--out", type=Path, help="the calibration (default: beside the network)")
    parser.add_argument(
        "--minutes", type=float, default=1.5, help="of searching, before measuring (default: %(default)s)"
    )
    options = parser.parse_args()
    out = options.out or beside(options.network)
    check_writable(out)
    backbone, setup = load_network(options.network), SETUPS["magi"]
    search_clips = Clips.held_out(backbone, SEARCH_CLIPS, SEARCH_CHUNKS, seed=100)
    final_clips = Clips.held_out(backbone, FINAL_CLIPS, FINAL_CHUNKS, seed=200)
    made = calibrate(
        ChunkSchedule(FINAL_CHUNKS, setup.steps, setup.lag),
        FINAL_CLIPS,
        scored(setup, search_clips),
        scored(setup, final_clips),
        60 * options.minutes,
        told=lambda words: print(words, flush=True),
        known=load(SHIPPED) if SHIPPED.is_file() else None,
    )
    save(made, out)
    print(f"{out}: {len(made.curve)} settings")


if __name__ == "__main__":
    main()
