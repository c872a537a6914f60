"""Prompts over time: a text with one line a segment says which chunks show what.

    0-4: a red circle
    7-9: a red circle *0.3 | a blue square *0.7
    12-: a green triangle

Chunks count from 0 at the beginning of the video. Chunks between two segments blend from one to the other. The first
segment also holds for chunks before it, the last one for all that follow.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import UserError, shortened

LINE = re.compile(r"(\d+)\s*(?:(-)\s*(\d+)?)?\s*:(.*)", re.DOTALL)
WEIGHT = re.compile(r"(.*)\*\s*(\S+)", re.DOTALL)
FOREVER = 2**31  # as the last chunk of a span: it holds to the end
LONGEST_BLEND = 1000  # chunks: each has an embedding of its own


@dataclass(frozen=True)
class Span:
    """Chunks that show the same.

    Attributes:
        first, last: their numbers, both included.
        weights: for each caption its share; they add up to 1.
    """

    first: int
    last: int
    weights: Mapping[str, float]


def parse(text: str) -> list[Span]:
    """Reads the spans of all chunks, in order and without a gap.

    Raises:
        UserError: names the line that cannot be read, or that overlaps the one before it.
    """
    segments: list[Span] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            segments.append(_segment(line, f"Line {number}"))
            _check_order(segments, f"Line {number}")
    if not segments:
        raise UserError("There are no prompts; write one line a segment, for example '0-4: a red circle'.")
    spans = [segments[0]]
    for before, after in pairwise(segments):
        spans += [*_blend(before, after), after]
    spans[0] = Span(0, spans[0].last, spans[0].weights)
    spans[-1] = Span(spans[-1].first, FOREVER, spans[-1].weights)
    return spans


def captions(spans: list[Span]) -> list[str]:
    """Lists every caption once, in order of appearance."""
    return list(dict.fromkeys(caption for span in spans for caption in span.weights))


def mix(embeddings: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Gives the weighted sum of captions' embeddings [B, tokens, width]; shorter ones are filled up with zeros."""
    if len(weights) == 1:
        return embeddings[next(iter(weights))]
    longest = max(embeddings[caption].shape[1] for caption in weights)
    shares = []
    for caption, weight in weights.items():
        tokens = embeddings[caption]
        shares.append(weight * nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1])))
    return torch.stack(shares).sum(dim=0)


def _segment(line: str, where: str) -> Span:
    found = LINE.fullmatch(line)
    if found is None:
        raise UserError(
            f"{where} is '{shortened(line, 40)}', expected chunks and a prompt, for example '0-4: a red circle'."
        )
    first, dash, last, said = found.groups()
    end = int(last) if last else FOREVER if dash else int(first)
    if end < int(first):
        raise UserError(f"{where} goes from chunk {first} to {end}; write the smaller number first.")
    return Span(int(first), end, _weights(said, where))


def _weights(said: str, where: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in said.split("|"):
        caption, weight = part.strip(), 1.0
        found = WEIGHT.fullmatch(caption)
        if found is not None:
            caption = found[1].strip()
            weight = _number(found[2], where)
        weights[caption] = weights.get(caption, 0.0) + weight
    total = sum(weights.values())
    if total <= 0:
        raise UserError(f"{where} has weights that add up to {total:g}; give at least one caption a weight above 0.")
    return {caption: weight / total for caption, weight in weights.items() if weight}


def _number(text: str, where: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d*)?|\.\d+", text):
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
    between = after.first - before.last - 1
    if between > LONGEST_BLEND and after.weights != before.weights:
        raise UserError(f"{where} leaves {between} chunks to blend; at most {LONGEST_BLEND} can.")


def _blend(before: Span, after: Span) -> list[Span]:
    if before.weights == after.weights:
        return [Span(before.last + 1, after.first - 1, before.weights)] if after.first - before.last > 1 else []
    spans = []
    for chunk in range(before.last + 1, after.first):
        share = (chunk - before.last) / (after.first - before.last)
        weights = {caption: (1 - share) * weight for caption, weight in before.weights.items()}
        for caption, weight in after.weights.items():
            weights[caption] = weights.get(caption, 0.0) + share * weight
        spans.append(Span(chunk, chunk, weights))
    return spans
