"""Conditions that hold for some chunks only: what Prompts over Time gives, as the host's guider meets it."""

from collections.abc import Hashable, Mapping
from itertools import accumulate

from torch import Tensor

from ...flowcache_core.demo.captions import embed_caption
from ...flowcache_core.errors import UserError
from ...flowcache_core.prompts import FOREVER, Blend, Span, after_cut, begins_shot
from ...flowcache_core.prompts import captions as captions_of

CHUNKS = "flowcache_chunks"  # of a condition: first and last chunk that it holds for
BLEND = "flowcache_blend"  # of a condition: a `Blend` of what its chunks are shown
SHOT = "flowcache_shot"  # of a condition: its first chunk begins a new shot
WHOLE = ("area", "mask", "control", "concat_latent_image")  # of a condition: they are made for a whole video at once

Conditions = dict[str, list[dict]]  # the host's: for each side of guidance a list, each with "uuid" and what it says


class ChunkCaptions:
    """The guider's conditions by chunk. A side of guidance without limits is the same for all chunks.

    Args:
        conditions: as the guider has processed them for a run.

    Raises:
        UserError: a condition brings something that is made for the whole video and cannot be cut into chunks, or is a
            blend that another node has changed.
    """

    def __init__(self, conditions: Conditions):
        self.conditions = conditions
        for side, held in conditions.items():
            for what in (name for one in held or [] for name in WHOLE if one.get(name) is not None):
                raise UserError(
                    f"The {side} prompt brings '{what}', which is for a whole video and does not go with chunks; leave "
                    f"that node out (images are given as a prefix)."
                )
            if any(BLEND in one and one["cross_attn"] is not one[BLEND].stands_in for one in held or []):
                raise UserError(
                    f"The {side} prompt is a blend of Prompts over Time that another node has changed; connect it "
                    f"straight to the node that samples."
                )

    def of(self, chunk: int) -> Conditions:
        """Gives what holds for a chunk.

        A side's n-th condition keeps one uuid for all chunks, since branches of guidance are told apart by it.
        """
        chosen = {}
        for side, conditions in self.conditions.items():
            conditions = conditions or []
            held = [one for one in conditions if _holds(one, chunk)]
            if conditions and not held:
                raise UserError(f"No {side} prompt holds for chunk {chunk}; connect one that does.")
            chosen[side] = [one | {"uuid": first["uuid"]} for one, first in zip(held, conditions, strict=False)]
        return chosen

    def show(self, chunk: int, condition: dict, oldest: int) -> None:
        """Takes what the positive prompt is from a chunk on, in place of the last condition.

        Args:
            condition: as the guider has processed it.
            oldest: chunk that may still ask what it is shown; what only chunks before it see is let go.
        """
        *before, last = self.conditions["positive"]
        ended = last | {CHUNKS: (last.get(CHUNKS, (0,))[0], chunk - 1)}
        kept = [one for one in [*before, ended] if one[CHUNKS][1] >= oldest]
        new = condition | {CHUNKS: (chunk, FOREVER), "uuid": last["uuid"]}
        self.conditions = self.conditions | {"positive": [*kept, new]}

    def begins_shot(self, chunk: int) -> bool:
        """Whether a new shot begins with a chunk."""
        return any(SHOT in one and one[CHUNKS][0] == chunk for one in self.conditions["positive"] or [])

    def text(self, chunk: int, uuid) -> Tensor:
        """Gives the embedding [B, tokens, width] of a branch of a chunk; a blend is mixed anew at every call."""
        one = self._held(chunk, uuid)
        return embedding_of(one, chunk, one["model_conds"]["c_crossattn"].cond)

    def shown(self, chunk: int, uuid) -> tuple[Hashable, object]:
        """Names what `text` gives, the same for chunks that are shown the same; the name is good as long as the object
        beside it is held."""
        one = self._held(chunk, uuid)
        kept = one[BLEND] if BLEND in one else one["model_conds"]["c_crossattn"].cond
        return (id(kept), chunk if BLEND in one else None), kept

    def _held(self, chunk: int, uuid) -> dict:
        return next(one for conditions in self.of(chunk).values() for one in conditions if one["uuid"] == uuid)

    @property
    def alike(self) -> bool:
        """Whether all chunks have as many conditions, which differ in nothing but their embedding: then chunks can be
        asked for at once."""
        for conditions in self.conditions.values():
            timed = [one for one in conditions or [] if CHUNKS in one]
            if not timed:
                continue
            extras = [set(one["model_conds"]) ^ {"c_crossattn"} for one in conditions]
            if len(set(_counts(conditions))) > 1 or any(extra != extras[0] for extra in extras):
                return False
        return True

    @property
    def texts(self) -> int:
        """How many different embeddings a branch has at most."""
        sides = (conditions or [] for conditions in self.conditions.values())
        return max((sum(_chunks(one) if BLEND in one else 1 for one in side) for side in sides), default=1)

    def refuse(self, what: str) -> None:
        """Raises UserError where a condition is limited to some chunks."""
        if any(CHUNKS in one for conditions in self.conditions.values() for one in conditions or []):
            raise UserError(f"Prompts over time need chunks one after another, not {what}; connect a single prompt.")


def encoded(clip, caption: str) -> tuple[Tensor, dict]:
    """A caption's embedding [1, tokens, width] and what its encoder says beside it; without one the demo's, which
    knows no words of a cut."""
    if clip is None:
        return embed_caption(after_cut(caption)), {}
    ((embedding, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return embedding, more


def span_conditions(span: Span, known: Mapping[str, tuple[Tensor, dict]]) -> list[tuple[Tensor, dict]]:
    """The conditions of a span's chunks.

    Args:
        known: `encoded` of each caption.
    """
    shown = {caption: known[caption][0] for caption in captions_of([span])}
    conditions = []
    for first, last, weights in span.nearest:
        embedding, said = known[max(weights, key=weights.__getitem__)]
        more = said | {CHUNKS: (first, last)} | ({SHOT: True} if begins_shot(weights) else {})
        if len(shown) > 1:
            more[BLEND] = Blend(span, shown, embedding)
        conditions.append((embedding, more))
    return conditions


def embedding_of(condition: dict, chunk: int, plain: Tensor) -> Tensor:
    """Gives what a condition shows a chunk [B, tokens, width]: its blend if it is one, else `plain`."""
    return condition[BLEND].at(chunk) if BLEND in condition else plain


def at_once(conditions: list[dict]) -> int:
    """Counts the conditions of one side of guidance that hold for the same chunk, at most."""
    return max(_counts(conditions))


def _chunks(condition: dict) -> int:
    first, last = condition[CHUNKS]
    return last - first + 1


def _holds(condition: dict, chunk: int) -> bool:
    first, last = condition.get(CHUNKS, (0, FOREVER))
    return first <= chunk <= last


def _counts(conditions: list[dict]) -> list[int]:
    """How many conditions hold at once, for every stretch of chunks in which they are the same."""
    changes = {0: 0}  # by chunk: how many more hold from it on
    for first, last in (one.get(CHUNKS, (0, FOREVER)) for one in conditions):
        changes[first] = changes.get(first, 0) + 1
        changes[last + 1] = changes.get(last + 1, 0) - 1
    return list(accumulate(changes[chunk] for chunk in sorted(changes) if chunk <= FOREVER))
