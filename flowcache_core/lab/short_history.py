"""What is lost with a short history: FlowCache's choice of tokens against other choices of the same size."""

from dataclasses import dataclass, replace
from typing import Literal

from ..compression import Compression
from ..history import HistorySettings
from ..presets import Settings
from .likeness import Likeness, Quality, likeness, pixels, quality
from .runs import Clips, Method, Outcome, run
from .setups import Setup

RULES: dict[str, Literal["flowcache", "window", "random"]] = {
    "importance x redundancy": "flowcache",
    "sliding window": "window",
    "random tokens": "random",
}


@dataclass(frozen=True)
class Kept:
    """A way of keeping the history: quality by itself, likeness to the whole history, peak bytes of a clip."""

    name: str
    quality: Quality
    likeness: Likeness | None
    history_bytes: int
    seconds: float


def short_history(setup: Setup, clips: Clips, settings: Settings, budget: int = 3) -> list[Kept]:
    """The same clips with the whole history and with each choice of `budget` clean chunks."""
    whole = run(Method("whole history", settings=settings), setup, clips)
    shown = pixels(whole.latents)
    made = [_kept("whole history", whole, clips, shown, None)]
    for name, rule in RULES.items():
        history = HistorySettings(budget, Compression(rule=rule))
        outcome = run(Method(name, settings=replace(settings, history=history)), setup, clips)
        made.append(_kept(name, outcome, clips, pixels(outcome.latents), shown))
    return made


def _kept(name: str, outcome: Outcome, clips: Clips, shown, whole) -> Kept:
    alike = None if whole is None else likeness(shown, whole)
    return Kept(name, quality(shown, clips.captions), alike, outcome.history_bytes, outcome.seconds)
