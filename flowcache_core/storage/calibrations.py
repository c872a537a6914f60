"""Calibrations as files beside the models that they are of."""

import hashlib
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..reuse.calibration import Calibration, parse_calibration, write_calibration
from .files import read_json_text, write_whole

SHIPPED = Path(__file__).parents[1] / "demo" / "network.flowcache.json"
SAMPLES, SAMPLE = 64, 4096  # blocks that a file is known again by, and their bytes
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf")  # of files in a model's folder that hold weights


def calibration_path(model: Path | str) -> Path:
    """Says where a model's calibration lies: beside its file, or in its folder."""
    model = Path(model)
    return model / "model.flowcache.json" if model.is_dir() else model.with_suffix(".flowcache.json")


def fingerprint(model: Path | str) -> str:
    """Eight hexadecimal digits by which the weights of a file or folder are known again, wherever it lies and whatever
    it is called: of sizes and some blocks, so that a file of 28 GB takes no time."""
    model, found = Path(model), hashlib.sha256()
    files = sorted(path for path in model.rglob("*") if path.suffix in ENDINGS) if model.is_dir() else [model]
    for path in files:
        size = path.stat().st_size
        found.update(size.to_bytes(8, "big"))
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * sample // (SAMPLES - 1))
                found.update(file.read(SAMPLE))
    return found.hexdigest()[:8]


def save_calibration(calibration: Calibration, path: Path, model: Path | str | None = None) -> Path:
    """Writes a calibration, which names the weights of its model where that is given; the file appears whole or not at
    all.

    Raises:
        UserError: the folder cannot be written to.
    """
    words = write_calibration(calibration if model is None else replace(calibration, weights=fingerprint(model)))
    return write_whole(path, lambda partial: partial.write_text(words))


def calibration_of(model: Path | str) -> Calibration | None:
    """Reads what was measured with a model; None where nothing was.

    Raises:
        UserError: no sound calibration, or one of other weights under the same name.
    """
    path = calibration_path(model)
    if not path.is_file():
        return None
    found = load_calibration(path)
    if found.weights and found.weights != (here := fingerprint(model)):
        raise UserError(
            f"{path.name} was measured with other weights ({found.weights}, these are {here}); calibrate the model "
            "again, or delete that file."
        )
    return found


def load_calibration(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UserError: no such file, or no sound calibration.
    """
    try:
        return parse_calibration(read_json_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is no calibration of FlowCache ({error}); calibrate the model again.") from error
