"""Calibrations as files beside the models that they are of."""

from pathlib import Path

from ..errors import UserError
from ..reuse.calibration import Calibration, parse_calibration, write_calibration
from .files import read_json_text, write_whole

SHIPPED = Path(__file__).parents[1] / "demo" / "network.flowcache.json"


def calibration_path(model: Path | str) -> Path:
    """Says where a model's calibration lies: beside its file, or in its folder."""
    model = Path(model)
    return model / "model.flowcache.json" if model.is_dir() else model.with_suffix(".flowcache.json")


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a calibration; the file appears whole or not at all.

    Raises:
        UserError: the folder cannot be written to.
    """
    words = write_calibration(calibration)
    write_whole(path, lambda partial: partial.write_text(words))


def load_calibration(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UserError: no such file, or no sound calibration.
    """
    try:
        return parse_calibration(read_json_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is no calibration of FlowCache ({error}); calibrate the model again.") from error
