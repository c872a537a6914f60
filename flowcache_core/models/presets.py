"""Recommended settings by name, and the one way from a name to settings."""

from dataclasses import replace

from ..errors import UserError
from ..reuse.calibration import Calibration, quality_of
from ..settings import (
    BY_FRAMES,
    HELD,
    MAGI_PAPER_CUT,
    OFF,
    Compression,
    Drift,
    HistorySettings,
    Settings,
    Spread,
)
from ..storage.calibrations import SHIPPED, load_calibration

# Steps spread by rule, forecast and corrected, won over every published rule in the project's own trials on the demo
# model; how many of them are recomputed was read off the same curves (`make bench`). The paper's settings are those of
# its MAGI-1 runs (threshold 0.01 and 0.015, warm-up 5, velocity held, no clean pass); SkyReels-V2's stand with its
# family.
PRESETS: dict[str, Settings] = {
    "off": OFF,
    "high": Settings(Spread(20 / 64, least=10)),
    "balanced": Settings(Spread(12 / 64, least=6)),
    "fast": Settings(Spread(8 / 64, least=4)),
    "paper slow": Settings(Drift(0.01), HELD, clean_pass=False),
    "paper fast": Settings(Drift(0.015), HELD, clean_pass=False),
}
DEFAULT_PRESET = "balanced"
PAPER_PRESETS = ("paper slow", "paper fast")


def preset(name: str, budget: int | None = None, compression: Compression | None = None) -> Settings:
    """Looks a preset up, with a history budget in clean chunks if wanted.

    Args:
        compression: how the history is cut; the paper's presets do it as the paper's MAGI-1 runs unless told otherwise.

    Raises:
        UserError: no such preset, or a budget smaller than what must stay.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset '{name}'. There are: {', '.join(PRESETS)}.")
    compression = compression or (MAGI_PAPER_CUT if name in PAPER_PRESETS else BY_FRAMES)
    return replace(PRESETS[name], history=HistorySettings(budget, compression))


def quality_settings(quality: float | str, calibration: Calibration | None = None) -> Settings:
    """Gives FlowCache's settings for a quality from 0 to 1 or one of `calibration.QUALITIES`, from a calibration or the
    shipped one.

    Raises:
        UserError: no such quality.
    """
    calibration = calibration or load_calibration(SHIPPED)
    chosen = calibration.choose(quality_of(quality))
    return OFF if chosen is None else Settings(measured_steps(chosen.steps, calibration.steps, calibration.lag))


def quality_notes(quality: float, calibration: Calibration | None = None) -> list[str]:
    """Says for the report where a quality is too high for anything to be reused."""
    calibration = calibration or load_calibration(SHIPPED)
    if calibration.choose(quality) is not None:
        return []
    highest = calibration.highest
    remedy = (
        "Calibrate FlowCache measures more" if highest is None else f"quality {highest:g} is the highest that reuses"
    )
    return [f"nothing is reused: nothing that was measured reaches a quality of {quality:g}; {remedy}"]


def measured_steps(recomputed: tuple[int, ...], steps: int, lag: int) -> Spread:
    """Takes a measured list of recomputed steps, which on another schedule becomes as large a share of its steps."""
    return Spread(len(recomputed) / steps, steps=recomputed, made_for=(steps, lag))


def recomputing(count: int, steps: int, lag: int) -> Spread:
    """Recomputes so many steps a chunk: as the shipped calibration lists them, where it was made for this schedule."""
    shipped = load_calibration(SHIPPED) if SHIPPED.exists() else None
    listed = shipped.by_count(count) if shipped and (shipped.steps, shipped.lag) == (steps, lag) else None
    return measured_steps(listed, steps, lag) if listed else Spread(count / steps, least=1)


def describe(settings: Settings, history: HistorySettings | None = None) -> str:
    """Writes a line for a report: the preset's name and how much history is kept, of a family that has its own that."""
    plain = replace(settings, history=OFF.history, overlap=OFF.overlap)
    names = [name for name, known in PRESETS.items() if known == plain]
    return f"FlowCache {names[0] if names else 'custom'}, {(history or settings.history).size_words}"
