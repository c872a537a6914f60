"""One knob for likeness and speed: which steps a model needs recomputed for which likeness to its plain run.

`calibrate` measures that on short clips of the model and writes it beside the model's file as
`<model>.flowcache.json`. Without such a file the demo model's is taken; on another schedule than it was made for, as
large a share of the steps is spread by rule (`placement.place_steps`).
"""

import json
from dataclasses import asdict, dataclass

from ..errors import UserError

FORMAT = "flowcache-calibration-1"
MOST = 100_000  # of anything that a calibration counts
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
        weights: those that it was measured with (`storage.calibrations.fingerprint`); "" where that was not noted.
    """

    steps: int
    lag: int
    chunks: int
    clips: int
    curve: tuple[Measured, ...]
    weights: str = ""

    def choose(self, quality: float) -> Measured | None:
        """The fewest recomputed steps that reach what the quality asks for; None for every step.

        Raises:
            UserError: the quality is not from 0 to 1.
        """
        wanted = decibels(quality)
        return next((one for one in self.curve if one.psnr >= wanted), None)

    @property
    def highest(self) -> float | None:
        """The highest quality in hundredths that recomputes fewer than all steps; None where there is none."""
        best = max((one.psnr for one in self.curve if len(one.steps) < self.steps), default=0.0)
        return next((hundredth / 100 for hundredth in range(99, -1, -1) if decibels(hundredth / 100) <= best), None)

    def by_count(self, count: int) -> tuple[int, ...] | None:
        """The list of so many recomputed steps, if one was measured."""
        return next((one.steps for one in self.curve if len(one.steps) == count), None)


def decibels(quality: float) -> float:
    """PSNR to the plain run that a quality asks for: 26 dB at 0, 38 at 0.5 (balanced), every step recomputed at 1."""
    if not 0.0 <= quality <= 1.0:
        raise UserError(f"The quality is {quality}, expected 0 to 1, or one of {', '.join(QUALITIES)}.")
    return float("inf") if quality == 1.0 else 26.0 + 24.0 * quality


def quality_of(quality: float | str) -> float:
    """Gives the number of a quality that may be a name.

    Raises:
        UserError: no such quality.
    """
    if not isinstance(quality, str):
        return quality
    if quality not in QUALITIES:
        raise UserError(f"There is no quality '{quality}'; expected 0 to 1, or one of {', '.join(QUALITIES)}.")
    return QUALITIES[quality]


def parse_calibration(text: str) -> Calibration:
    """Reads a calibration from what a file holds.

    Raises:
        ValueError: no sound calibration.
    """
    try:
        told = json.loads(text)
        if told.pop("format") != FORMAT:
            raise ValueError("another format")
        curve = tuple(Measured(tuple(one["steps"]), float(one["psnr"])) for one in told.pop("curve"))
        calibration = Calibration(**told, curve=curve)
        if not all(type(told[name]) is int and 0 < told[name] <= MOST for name in ("steps", "lag", "chunks", "clips")):
            raise ValueError(f"a steps, lag, chunks or clips that is no number from 1 to {MOST}")
        if not isinstance(calibration.weights, str):
            raise ValueError(f"weights called {calibration.weights}")
        for one in curve:
            if list(one.steps) != sorted({*one.steps, 0}) or one.steps[-1] >= calibration.steps:
                raise ValueError(f"a list of steps {one.steps}")
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(error) from error
    return calibration


def write_calibration(calibration: Calibration) -> str:
    """Writes a calibration as the text of its file."""
    return json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n"
