"""Calibrates the model that ships, or another of its family: `python -m flowcache_core.lab.search`.

Lists are searched for teacher-forced, where no clip parts from the plain run and hides what a step was worth, and
measured in free runs on other captions. All clips of a part go through the network in one batch; the curve is written
beside the model. See `calibrate`.
"""

import argparse
from pathlib import Path

from torch import Tensor

from ..calibration import calibrate_clips
from ..demo import NETWORK_FILE, load_network
from ..schedule import ChunkSchedule
from ..settings import OFF, Settings
from ..storage.calibrations import SHIPPED, calibration_path, load_calibration, save_calibration
from ..storage.files import check_writable
from .likeness import pixels
from .runs import Clips, Method, run
from .setups import SETUPS
from .teacher import Teacher, taught

SEARCH_CLIPS, SEARCH_CHUNKS = 4, 4
MEASURED = 1  # number of the other part
ALONE = 2.0  # a step of the demo model that no other chunk recomputes with, over one in company (two cores)
FINAL_CLIPS, FINAL_CHUNKS = 24, 16  # clips differ by 12 dB (standard deviation at `balanced`): 8 tell too little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--network", type=Path, default=NETWORK_FILE, help="of the demo's family (default: what ships)")
    parser.add_argument("--out", type=Path, help="the calibration (default: beside the network)")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of searching, before measuring (default: %(default)s)"
    )
    options = parser.parse_args()
    out = options.out or calibration_path(options.network)
    check_writable(out)
    backbone, setup = load_network(options.network), SETUPS["magi"]
    parts = (
        Clips.held_out(backbone, SEARCH_CLIPS, SEARCH_CHUNKS, seed=100),
        Clips.held_out(backbone, FINAL_CLIPS, FINAL_CHUNKS, seed=200),
    )

    teacher = Teacher(setup.steps)

    def make(settings: Settings, number: int) -> Tensor:
        method, clips = Method("searched", settings=settings), parts[number]
        if number == MEASURED:
            return pixels(run(method, setup, clips).latents)
        if settings == OFF:  # comes first
            return pixels(run(method, setup, clips, watch=teacher.watch).latents)
        return pixels(taught(method, setup, clips, teacher))

    made = calibrate_clips(
        ChunkSchedule(FINAL_CHUNKS, setup.steps, setup.lag),
        make,
        options.minutes,
        span=2.0,
        told=lambda line: print(line, flush=True),
        known=load_calibration(SHIPPED) if SHIPPED.is_file() else None,
        alone=ALONE,
    )
    save_calibration(made, out, options.network)
    print(f"{out}: {len(made.curve)} settings")


if __name__ == "__main__":
    main()
