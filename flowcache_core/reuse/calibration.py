"""One knob for likeness and speed: which steps a model needs recomputed for which likeness to its plain run.

`lab.search` measures that on one short clip of the model and writes it beside the model's file as
`<model>.flowcache.json`. Without such a file the demo model's is taken; on another schedule than it was made for, as
large a share of the steps is spread by rule (`spread.spread`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError
from ..models.presets import ReuseSettings, Settings
from ..storage.files import write_whole

FORMAT = "flowcache-calibration-1"
SHIPPED = Path(__file__).parents[1] / "demo" / "network.flowcache.json"
# Quality by name; between them it is what number you like.
QUALITIES = {"draft": 0.2, "balanced": 0.5, "high": 0.8, "lossless": 1.0}


@dataclass(frozen=True)
class Measured:
    """What was measured with one list of recomputed steps.

    Attributes:
        steps: recomputed ones of every chunk.
        psnr: to the plain run, dB, mean over clips.
    """

    steps: tuple[int, ...]
    psnr: float


@dataclass(frozen=True)
class Calibration:
    """Of one model and schedule.

    Attributes:
        steps, lag: of the schedule.
        chunks, clips: that it was measured on.
        curve: fewest recomputed steps first.
    """

    steps: int
    lag: int
    chunks: int
    clips: int
    curve: tuple[Measured, ...]

    def choose(self, quality: float) -> Measured | None:
        """The fewest recomputed steps that reach what the quality asks for; None for every step.

        Raises:
            UserError: the quality is not from 0 to 1.
        """
        wanted = decibels(quality)
        return next((one for one in self.curve if one.psnr >= wanted), None)

    def by_count(self, count: int) -> tuple[int, ...] | None:
        """The list of so many recomputed steps, if one was measured."""
        return next((one.steps for one in self.curve if len(one.steps) == count), None)


def decibels(quality: float) -> float:
    """PSNR to the plain run that a quality asks for: 26 dB at 0, 38 at 0.5 (balanced), every step recomputed at 1."""
    if not 0.0 <= quality <= 1.0:
        raise UserError(f"The quality is {quality}, expected 0 to 1, or one of {', '.join(QUALITIES)}.")
    return float("inf") if quality == 1.0 else 26.0 + 24.0 * quality


def settings_of(quality: float | str, calibration: Calibration | None = None) -> Settings:
    """FlowCache's settings for a quality from 0 to 1 or one of `QUALITIES`, from a calibration or the shipped one.

    Raises:
        UserError: no such quality.
    """
    if isinstance(quality, str):
        if quality not in QUALITIES:
            raise UserError(f"There is no quality '{quality}'; expected 0 to 1, or one of {', '.join(QUALITIES)}.")
        quality = QUALITIES[quality]
    calibration = calibration or load(SHIPPED)
    chosen = calibration.choose(quality)
    return Settings() if chosen is None else Settings(reuse(chosen.steps, calibration.steps, calibration.lag))


def reuse(recomputed: tuple[int, ...], steps: int, lag: int) -> ReuseSettings:
    """A list of recomputed steps, which on another schedule becomes as large a share of its steps."""
    return ReuseSettings("spread", share=len(recomputed) / steps, steps=recomputed, made_for=(steps, lag))


def recomputing(count: int, steps: int, lag: int) -> ReuseSettings:
    """So many recomputed steps a chunk: as the shipped calibration lists them, where it was made for this schedule."""
    shipped = load(SHIPPED) if SHIPPED.exists() else None
    listed = shipped.by_count(count) if shipped and (shipped.steps, shipped.lag) == (steps, lag) else None
    return reuse(listed, steps, lag) if listed else ReuseSettings("spread", share=count / steps, least=1)


def beside(model: Path | str) -> Path:
    """Where a model's calibration lies."""
    return Path(model).with_suffix(".flowcache.json")


def save(calibration: Calibration, path: Path) -> None:
    """Writes a calibration; the file appears whole or not at all.

    Raises:
        UserError: the folder cannot be written to.
    """
    words = json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(words))


def load(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UserError: no such file, or no sound calibration.
    """
    try:
        told = json.loads(path.read_text())
        if told.pop("format") != FORMAT:
            raise ValueError("another format")
        curve = tuple(Measured(tuple(one["steps"]), float(one["psnr"])) for one in told.pop("curve"))
        calibration = Calibration(**told, curve=curve)
        for one in curve:
            if list(one.steps) != sorted({*one.steps, 0}) or one.steps[-1] >= calibration.steps:
                raise ValueError(f"a list of steps {one.steps}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path.name} is no calibration of FlowCache ({error}); calibrate the model again.") from error
    return calibration
