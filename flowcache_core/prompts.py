"""Prompts over time: a text with one line a segment says which chunks show what.

    0-4: a red circle
    7-9: a red circle *0.3 | a blue square *0.7
    12-: a green triangle

Chunks count from 0 at the beginning of the video. Chunks between two segments blend from one to the other. The first
segment also holds for chunks before it, the last one for all that follow.

A segment that begins with "The scene transitions." begins a new shot, of models that make videos of several: its first
chunk shows all of it, the others what is behind that. Source: LongLive 2.0, utils/dataset.py (`scene_cut_prefix`).

Signs count in the forms of other keyboards too. Between double quotes, and behind a backslash, a bar or a star is part
of the prompt, as is a star that no number follows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from .errors import UserError, shortened

WEIGHT = re.compile(r"\d{1,6}(\.\d{0,20})?|\.\d{1,20}")
COLONS, DASHES = re.compile("[:：]"), re.compile("[-–—－~～]")
RATIO = re.compile(r"(\d+[:：]\d+)\b")
BRACES = re.compile(r"{[^{}]*}")
NUMERIC = re.compile(r"[-+.,\d]+[\w.,%-]*")  # what was meant as a number
BARS, STARS, QUOTES = "|｜", "*＊", {'"': '"', "“": "”"}
TEXT = {sign: chr(0xE000 + number) for number, sign in enumerate("|｜*＊")}  # stand for signs that are text, meanwhile
FOREVER = 2**31  # as the last chunk of a span: it holds to the end
DIGITS = 9  # of a chunk's number, at most
CUT = "The scene transitions. "
MOST_CAPTIONS = 1000  # each is encoded, and its embedding kept: 8 MB of Wan's


@dataclass(frozen=True)
class Span:
    """Chunks that show the same, or that lead from one segment to the next.

    Attributes:
        first, last: their numbers, both included.
        weights: for each caption its share; they add up to 1. Of chunks that blend: what is shown before them.
        towards: of chunks that blend, what is shown after them; else None.
    """

    first: int
    last: int
    weights: Mapping[str, float]
    towards: Mapping[str, float] | None = None

    @property
    def nearest(self) -> list[tuple[int, int, Mapping[str, float]]]:
        """Stretches of chunks, first and last, with the segment's weights that each is nearest to."""
        middle = self.first + (self.last - self.first) // 2 if self.towards else self.last
        parts = [(self.first, middle, self.weights), (middle + 1, self.last, self.towards or self.weights)]
        return [part for part in parts if part[0] <= part[1]]

    def at(self, chunk: int) -> Mapping[str, float]:
        """Gives what a chunk of the span shows: for each caption its share."""
        if self.towards is None:
            return self.weights
        share = (chunk - self.first + 1) / (self.last - self.first + 2)
        weights = {caption: (1 - share) * weight for caption, weight in self.weights.items()}
        for caption, weight in self.towards.items():
            weights[caption] = weights.get(caption, 0.0) + share * weight
        return weights


@dataclass(frozen=True, repr=False)
class Blend:
    """What the chunks of a span show, as embeddings that are mixed when a chunk asks for one.

    Attributes:
        span: of the chunks.
        embeddings: of each of its captions, [B, tokens, width].
        stands_in: the embedding that a host is shown in its place.
    """

    span: Span
    embeddings: Mapping[str, Tensor]
    stands_in: Tensor

    def at(self, chunk: int) -> Tensor:
        """Mixes a chunk's embedding [B, tokens, width]."""
        return mix(self.embeddings, self.span.at(chunk))


def parse(text: str) -> list[Span]:
    """Reads the spans of all chunks, in order and without a gap.

    Raises:
        UserError: names the line that cannot be read, or that overlaps the one before it.
    """
    segments: list[Span] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line and line[0] not in "#＃":
            segments.append(_segment(line, f"Line {number}"))
            _check_order(segments, f"Line {number}")
    if not segments:
        raise UserError("There are no prompts; write one line a segment, for example '0-4: a red circle'.")
    if (count := len(captions(segments))) > MOST_CAPTIONS:
        raise UserError(f"There are {count} different captions, expected at most {MOST_CAPTIONS}; write fewer.")
    segments = [part for segment in segments for part in _shot(segment)]
    spans = [segments[0]]
    for before, after in pairwise(segments):
        spans += [*_blend(before, after), after]
    spans[0] = replace(spans[0], first=0)
    spans[-1] = replace(spans[-1], last=FOREVER)
    return spans


def begins_shot(weights: Mapping[str, float]) -> bool:
    """Whether captions, by their share, begin a new shot."""
    return len(weights) == 1 and next(iter(weights)).startswith(CUT)


def after_cut(caption: str) -> str:
    """What the other chunks of a shot show."""
    return caption.removeprefix(CUT).strip() or caption


def captions(spans: list[Span]) -> list[str]:
    """Lists every caption once, in order of appearance."""
    return list(dict.fromkeys(caption for span in spans for caption in [*span.weights, *(span.towards or ())]))


def mix(embeddings: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Gives the weighted sum of captions' embeddings [B, tokens, width]; shorter ones are filled up with zeros."""
    if len(weights) == 1:
        return embeddings[next(iter(weights))]
    longest = max((embeddings[caption] for caption in weights), key=lambda tokens: tokens.shape[1])
    mixed = longest.new_zeros(longest.shape)
    for caption, weight in weights.items():
        tokens = embeddings[caption]
        mixed[:, : tokens.shape[1]] += weight * tokens
    return mixed


def _segment(line: str, where: str) -> Span:
    chunks, *said = COLONS.split(line, maxsplit=1)
    first, *last = (part.strip() for part in DASHES.split(chunks, maxsplit=1))
    if ratio := RATIO.match(line):
        raise UserError(
            f"{where} begins with '{ratio[1]}', a ratio or a chunk's number; write the chunks in front, for example "
            f"'0-4: {ratio[1]} …', or a space behind the colon."
        )
    if not (said and first.isdecimal() and all(part.isdecimal() or not part for part in last)):
        raise UserError(
            f"{where} is '{shortened(line, 40)}', expected chunks and a prompt, for example '0-4: a red circle'."
        )
    longest = max([first, *last], key=len)
    if len(longest) > DIGITS:
        raise UserError(f"{where} names chunk {shortened(longest, 20)}; at most {DIGITS} digits can.")
    end = int(first) if not last else int(last[0]) if last[0] else FOREVER
    if end < int(first):
        raise UserError(f"{where} goes from chunk {first} to {end}; write the smaller number first.")
    return Span(int(first), end, _weights(said[0], where))


def _weights(said: str, where: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in re.split(f"[{BARS}]", _hidden(said, where)):
        caption, weight = _weighted(part.strip(), where)
        caption = _shown(caption)
        weights[caption] = weights.get(caption, 0.0) + weight
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{where} has weights that add up to {total:g}; give at least one caption a weight above 0.")
    return {caption: weight / total for caption, weight in weights.items() if weight}


def _weighted(part: str, where: str) -> tuple[str, float]:
    """A caption and its weight: what is behind the last star, if that is a number."""
    at = max(part.rfind(star) for star in STARS)
    caption, after = part[:at].rstrip(), part[at + 1 :].strip()
    if at < 0 or not NUMERIC.fullmatch(after):
        return part, 1.0
    if part[at - 1 : at].isdecimal():
        raise UserError(
            f"{where} ends with '{shortened(part.split()[-1], 20)}', a product or a weight; write a space before the "
            f"star of a weight, and a backslash before one that is part of the prompt."
        )
    return caption, _number(after, where)


def _hidden(said: str, where: str) -> str:
    """A text whose signs between quotes and behind backslashes are hidden.

    Raises:
        UserError: a choice in braces, which only the page makes.
    """
    ends = {sign: said.rfind(sign) for sign in QUOTES.values()}
    signs: list[str] = []
    until, behind = "", False  # the quote that ends what is text; whether a backslash stands before
    for number, sign in enumerate(said):
        if behind and sign in TEXT:
            signs[-1], behind = TEXT[sign], False
            continue
        behind = sign == "\\" and not behind
        signs.append(TEXT.get(sign, sign) if until else sign)
        if until:
            until = "" if sign == until else until
        elif sign in QUOTES and number < ends[QUOTES[sign]]:
            until = QUOTES[sign]
    hidden = "".join(signs)
    for found in BRACES.findall(hidden):
        if any(bar in found for bar in BARS):
            raise UserError(
                f"{where} has the choice '{shortened(found, 40)}', which ComfyUI's page makes and nobody else; write "
                f"one of them, or put the bar between double quotes."
            )
    return hidden


def _shown(hidden: str) -> str:
    """The text with its hidden signs as they were."""
    return hidden.translate({ord(stand_in): sign for sign, stand_in in TEXT.items()})


def _number(text: str, where: str) -> float:
    text = text.replace(",", ".", 1)
    if not WEIGHT.fullmatch(text):
        raise UserError(
            f"{where} has the weight '{shortened(text, 40)}', expected a number after '*', for example '*0.7'."
        )
    return float(text)


def _check_order(segments: list[Span], where: str) -> None:
    if len(segments) < 2:
        return
    before, after = segments[-2:]
    if before.last == FOREVER:
        raise UserError(f"{where} comes after '{before.first}-:', which holds to the end; give that one a last chunk.")
    if after.first <= before.last:
        raise UserError(
            f"{where} begins at chunk {after.first}, but the one before it holds up to chunk {before.last}."
        )


def _shot(segment: Span) -> list[Span]:
    """A segment, or its first chunk and the others where that begins a shot."""
    if segment.first == segment.last or not begins_shot(segment.weights):
        return [segment]
    (caption,) = segment.weights
    rest = Span(segment.first + 1, segment.last, {after_cut(caption): 1.0})
    return [replace(segment, last=segment.first), rest]


def _blend(before: Span, after: Span) -> list[Span]:
    first, last = before.last + 1, after.first - 1
    if first > last:
        return []
    return [Span(first, last, before.weights, None if before.weights == after.weights else after.weights)]
