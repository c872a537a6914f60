"""What is lost with a short history: FlowCache's choice of tokens, others of the same size, published rules, and for
comparison the whole history in fewer bits."""

from dataclasses import asdict, dataclass, replace
from functools import partial

from torch import Tensor

from ..demo.train_network import FRAMES_PER_CHUNK
from ..settings import BY_FRAMES, Compression, HistorySettings, Settings, bounded_history
from .history_rules import PUBLISHED_RULES, ruled_engine
from .likeness import Likeness, Quality, likeness, pixels, quality
from .looks import Looks, Seen
from .quant_videogen import two_bit_engine
from .runs import Clips, Method, Outcome, run
from .setups import Setup


def choices(budget: int) -> dict[str, HistorySettings]:
    """Ours first; then others that keep as many clean chunks."""
    window = (budget + 1) * FRAMES_PER_CHUNK  # with the chunk's own
    return {
        "frames by importance": HistorySettings(budget, BY_FRAMES),
        "tokens as published": HistorySettings(budget, Compression()),
        "sliding window": HistorySettings(budget, Compression(rule="window")),
        "random tokens": HistorySettings(budget, Compression(rule="random")),
        "deep sink": bounded_history(None, window, 0, rule="deep sink"),
        "rolling sink": bounded_history(None, window, 0, rule="rolling sink"),
    }


WHOLE_IN_BITS: dict[str, HistorySettings] = {
    "8 bits, all chunks": HistorySettings(type="int8"),
    "4 bits, all chunks": HistorySettings(type="int4"),
}


@dataclass(frozen=True)
class Kept:
    """A way of keeping the history: whether it stays within the budget, quality by itself, likeness to the whole
    history and how it looks beside it, peak bytes of a clip."""

    name: str
    bounded: bool
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
    made = [_kept("whole history", False, whole, clips, seen, None)]

    def add(method: Method, bounded: bool = True) -> None:
        outcome = run(method, setup, clips)
        made.append(_kept(method.name, bounded, outcome, clips, seen, pixels(outcome.latents)))

    for name, history in choices(budget).items():
        add(Method(name, settings=replace(settings, history=history)))
    for name, rule in PUBLISHED_RULES.items():
        add(Method(name, settings=settings, build=partial(ruled_engine, rule=rule, budget=budget)))
    for name, history in WHOLE_IN_BITS.items():
        add(Method(name, settings=replace(settings, history=history)), bounded=False)
    add(Method("Quant-VideoGen, all chunks", settings=settings, build=two_bit_engine), bounded=False)
    return made


def _kept(name: str, bounded: bool, outcome: Outcome, clips: Clips, whole: Seen, cut: Tensor | None) -> Kept:
    alike = None if cut is None else likeness(cut, whole.pixels)
    shown = whole.pixels if cut is None else cut
    return Kept(
        name, bounded, quality(shown, clips.captions), alike, whole.looks(shown), outcome.history_bytes, outcome.seconds
    )
