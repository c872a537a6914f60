"""Writes the trained network as the file that ships: `python -m flowcache_core.demo.export out/demo_network.pt`.

float16 matrices, Wan 2.1's names, and metadata by which ComfyUI's stock loader takes it for a causal AR model.
"""

import argparse
from pathlib import Path

import torch

from .. import checkpoints
from ..checkpoints.weight_files import write_safetensors
from ..errors import UserError
from ..storage.files import write_whole
from .shipped import NETWORK_FILE
from .train_network import CONFIG


def export(trained: Path, out: Path = NETWORK_FILE) -> Path:
    """The averaged weights of a training checkpoint to a safetensors file, which replaces an older one.

    Raises:
        UserError: no training checkpoint, weights that float16 cannot hold, or a folder that cannot be written to.
    """
    try:
        saved = torch.load(trained, map_location="cpu", weights_only=True)
        weights, steps, minutes = saved["average"], saved["step"], saved["seconds"] / 60
    except Exception as error:  # torch raises many kinds for what it will not read
        raise UserError(
            f"{trained} is no checkpoint of train_network ({error!r}); give the file that it saved."
        ) from error
    overflown = [name for name, weight in weights.items() if not weight.half().isfinite().all()]
    if overflown:
        raise UserError(f"{overflown[0]} holds values that float16 cannot: the training has gone wrong; train again.")
    info = checkpoints.CheckpointInfo("demo", CONFIG, torch.float16, "wan", "", {}, 0)
    metadata = checkpoints.stamp(info) | {"training": f"{steps} steps, {minutes:.0f} minutes"}
    return write_whole(out, lambda partial: write_safetensors(weights, metadata, partial, torch.float16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("trained", type=Path, help="checkpoint that train_network saved")
    parser.add_argument("--out", type=Path, default=NETWORK_FILE)
    options = parser.parse_args()
    out = export(options.trained, options.out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
