"""What is lost with a short history: FlowCache's choice of tokens, others of the same size, and published rules."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor

from ..engine.loop import Engine
from ..settings import BY_FRAMES, Compression, HistorySettings, Settings
from .history_rules import PUBLISHED_RULES, ruled_engine
from .likeness import Likeness, Quality, likeness, pixels, quality
from .looks import Looks, Seen
from .quant_videogen import two_bit_engine
from .runs import Clips, Method, Outcome, run
from .setups import Setup

CHOICES = {
    "frames by importance": BY_FRAMES,
    "tokens as published": Compression(),
    "sliding window": Compression(rule="window"),
    "random tokens": Compression(rule="random"),
}


@dataclass(frozen=True)
class Kept:
    """A way of keeping the history: quality by itself, likeness to the whole history and how it looks beside it, peak
    bytes of a clip."""

    name: str
    quality: Quality
    likeness: Likeness | None
    looks: Looks
    history_bytes: int
    seconds: float

    def as_dict(self) -> dict:
        alike = self.likeness
        told = alike and {"psnr": alike.psnr, "ssim": alike.ssim, "psnr_clips": alike.spread.each}
        return asdict(self) | {"likeness": told, "looks": self.looks.as_dict()}


def short_history(setup: Setup, clips: Clips, settings: Settings, budget: int = 3) -> list[Kept]:
    """The same clips with the whole history and with each choice of `budget` clean chunks."""
    whole = run(Method("whole history", settings=settings), setup, clips)
    seen = Seen(pixels(whole.latents))
    made = [_kept("whole history", whole, clips, seen, None)]
    for name, choice in CHOICES.items():
        history = HistorySettings(budget, choice)
        outcome = run(Method(name, settings=replace(settings, history=history)), setup, clips)
        made.append(_kept(name, outcome, clips, seen, pixels(outcome.latents)))
    builds: dict[str, Callable[..., Engine]] = {"Quant-VideoGen, all chunks": two_bit_engine}
    builds |= {name: partial(ruled_engine, rule=rule, budget=budget) for name, rule in PUBLISHED_RULES.items()}
    for name, build in builds.items():
        outcome = run(Method(name, settings=settings, build=build), setup, clips)
        made.append(_kept(name, outcome, clips, seen, pixels(outcome.latents)))
    return made


def _kept(name: str, outcome: Outcome, clips: Clips, whole: Seen, cut: Tensor | None) -> Kept:
    alike = None if cut is None else likeness(cut, whole.pixels)
    shown = whole.pixels if cut is None else cut
    return Kept(name, quality(shown, clips.captions), alike, whole.looks(shown), outcome.history_bytes, outcome.seconds)
