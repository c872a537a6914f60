"""Captions of a run that change while it goes on, kept as Prompts over Time: what is written is what was shown.

A change holds from a chunk on, or is blended over some chunks that each have their own line. Weights are multiples of
2^-10, which decimals and floats hold exactly, so that the text read again gives the same weights to the bit.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UserError
from .prompts import BARS, BRACES, MOST_CAPTIONS, STARS, after_cut, begins_shot, parse

LONGEST = 2**16  # bytes of a caption
LONGEST_TEXT = 2**20  # bytes of all of a run
MOST_BLENDED = 1000  # chunks that a change may take
GRAIN = 2**10  # of a weight
NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Shown:
    """What is shown from a chunk on, until the next of these.

    Attributes:
        first: the chunk.
        weights: for each caption its share.
        said: the same as a segment of Prompts over Time holds it.
    """

    first: int
    weights: Mapping[str, float]
    said: str

    @classmethod
    def of(cls, first: int, weights: Mapping[str, float]) -> "Shown":
        """Raises UserError where a segment cannot hold the captions as they are."""
        for write in (str, _escaped):
            parts = [write(caption) + _behind(weight) for caption, weight in weights.items()]
            said = " | ".join(parts)
            if _reads_as(said, weights):
                return cls(first, weights, said)
        raise UserError(
            "The caption has signs that Prompts over Time cannot hold (a backslash before a bar or star, or a lone "
            "quotation mark); leave them out."
        )


@dataclass(frozen=True)
class Timeline:
    """What the chunks of a video show, oldest first; never empty."""

    shown: tuple[Shown, ...]

    @classmethod
    def begin(cls, caption: str, chunk: int = 0, before: "Timeline | None" = None) -> "Timeline":
        """A caption that holds from a chunk on, behind what the chunks before it showed, where that is known.

        Raises:
            UserError: as for `changed`.
        """
        if before is None or before.shown[0].first >= chunk:
            return cls((Shown.of(chunk, {cleaned(caption): 1.0}),))
        return before.changed(chunk, caption)

    @classmethod
    def read(cls, text: str) -> "Timeline":
        """Reads what `text` wrote.

        Raises:
            UserError: another text.
        """
        spans, number = parse(text), NUMBER.match(text)
        if number is None or any(span.towards for span in spans):
            raise UserError("The captions are no record of a run: chunks between two segments are left out.")
        firsts = [int(number[0]), *(span.first for span in spans[1:])]
        return cls(tuple(Shown.of(first, span.weights) for first, span in zip(firsts, spans, strict=True)))

    def at(self, chunk: int) -> Mapping[str, float]:
        """Gives what a chunk shows: for each caption its share."""
        return next((one for one in reversed(self.shown) if one.first <= chunk), self.shown[0]).weights

    def changed(self, chunk: int, caption: str, over: int = 0) -> "Timeline":
        """The same up to a chunk, and from there another caption. One that begins a new shot is not blended.

        Args:
            over: chunks over which the change is blended; it holds alone from the one after them on.

        Raises:
            UserError: a caption that cannot be written down, or too many of them.
        """
        caption = cleaned(caption)
        wanted = {caption: 1.0}
        before = [one for one in self.shown if one.first < chunk]
        base = (before[-1] if before else self.shown[0]).weights
        if before and base == wanted:
            return Timeline(tuple(before))
        cut = begins_shot(wanted)
        over = 0 if base == wanted or cut else min(over, MOST_BLENDED)
        steps = [_blended(base, caption, (step + 1) / (over + 1)) for step in range(over)]
        new = [Shown.of(chunk + step, weights) for step, weights in enumerate([*steps, wanted])]
        new += [Shown.of(chunk + 1, {after_cut(caption): 1.0})] if cut else []
        made = Timeline((*before, *new))
        count = len({known for one in made.shown for known in one.weights})
        if count > MOST_CAPTIONS or len(made.text().encode()) > LONGEST_TEXT:
            raise UserError(
                f"The captions of this run are more than {MOST_CAPTIONS}, or longer than {LONGEST_TEXT // 2**20} MB "
                "together; go on from its state in a new run."
            )
        return made

    def until(self, chunk: int) -> "Timeline":
        """Only what is shown before a chunk."""
        return Timeline(tuple(one for one in self.shown if one.first < chunk) or self.shown[:1])

    def text(self) -> str:
        """Writes it as the text of Prompts over Time, the last line to the end."""
        ends = [f"-{after.first - 1}" if after.first - 1 > one.first else "" for one, after in self._pairs]
        return "\n".join(f"{one.first}{end}: {one.said}" for one, end in zip(self.shown, [*ends, "-"], strict=True))

    @property
    def _pairs(self) -> list[tuple[Shown, Shown]]:
        return list(zip(self.shown, self.shown[1:], strict=False))


def cleaned(caption: str) -> str:
    """The caption on one line, as Prompts over Time holds it.

    Raises:
        UserError: too long, no text, or with a choice that the page would have made.
    """
    try:
        size = len(caption.encode())
    except UnicodeEncodeError as error:
        raise UserError("The caption holds halves of characters; write it anew.") from error
    if size > LONGEST:
        raise UserError(f"The caption has {size:,} bytes, expected at most {LONGEST:,}; write a shorter one.")
    if any(bar in found for found in BRACES.findall(caption) for bar in BARS):
        raise UserError("The caption has a choice in braces, which ComfyUI's page makes and nobody else; write one.")
    return " ".join(caption.split())


def _blended(base: Mapping[str, float], caption: str, share: float) -> dict[str, float]:
    """Part of the way from some captions to another, in grains that add up to 1."""
    grains = {known: round((1 - share) * weight * GRAIN) for known, weight in base.items()}
    grains[caption] = grains.get(caption, 0) + GRAIN - sum(grains.values())
    return {known: count / GRAIN for known, count in grains.items() if count > 0}


def _behind(weight: float) -> str:
    return "" if weight == 1.0 else " *" + f"{weight:.10f}".rstrip("0")


def _escaped(caption: str) -> str:
    return "".join("\\" + sign if sign in BARS + STARS else sign for sign in caption)


def _reads_as(said: str, weights: Mapping[str, float]) -> bool:
    try:
        (span,) = parse(f"0: {said}")
    except UserError:
        return False
    return list(span.weights.items()) == list(weights.items())
