"""Conditions that hold for some chunks only: what Prompts over Time gives, as the host's guider meets it."""

from torch import Tensor

from ...flowcache_core.errors import UserError
from ...flowcache_core.prompts import FOREVER

CHUNKS = "flowcache_chunks"  # of a condition: first and last chunk that it holds for
WHOLE = ("area", "mask", "control", "concat_latent_image")  # of a condition: they are made for a whole video at once

Conditions = dict[str, list[dict]]  # the host's: for each side of guidance a list, each with "uuid" and what it says


class ChunkCaptions:
    """The guider's conditions by chunk. A side of guidance without limits is the same for all chunks.

    Args:
        conditions: as the guider has processed them for a run.

    Raises:
        UserError: a condition brings something that is made for the whole video and cannot be cut into chunks.
    """

    def __init__(self, conditions: Conditions):
        self.conditions = conditions
        for side, held in conditions.items():
            for what in (name for one in held or [] for name in WHOLE if one.get(name) is not None):
                raise UserError(
                    f"The {side} prompt brings '{what}', which is for a whole video and does not go with chunks; leave "
                    f"that node out (images are given as a prefix)."
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

    def text(self, chunk: int, uuid) -> Tensor:
        """Gives the embedding [B, tokens, width] of a branch of a chunk."""
        held = [one for conditions in self.of(chunk).values() for one in conditions if one["uuid"] == uuid]
        return held[0]["model_conds"]["c_crossattn"].cond

    @property
    def alike(self) -> bool:
        """Whether all chunks have as many conditions, which differ in nothing but their embedding: then chunks can be
        asked for at once."""
        for conditions in self.conditions.values():
            timed = [one for one in conditions or [] if CHUNKS in one]
            if not timed:
                continue
            counts = {sum(_holds(one, chunk) for one in conditions) for chunk in _borders(timed)}
            extras = [set(one["model_conds"]) ^ {"c_crossattn"} for one in conditions]
            if len(counts) > 1 or any(extra != extras[0] for extra in extras):
                return False
        return True

    @property
    def texts(self) -> int:
        """How many different embeddings a branch has at most."""
        return max((len(conditions or []) for conditions in self.conditions.values()), default=1)

    def refuse(self, what: str) -> None:
        """Raises UserError where a condition is limited to some chunks."""
        if any(CHUNKS in one for conditions in self.conditions.values() for one in conditions or []):
            raise UserError(f"Prompts over time need chunks one after another, not {what}; connect a single prompt.")


def _holds(condition: dict, chunk: int) -> bool:
    first, last = condition.get(CHUNKS, (0, FOREVER))
    return first <= chunk <= last


def _borders(conditions: list[dict]) -> set[int]:
    """A chunk of every stretch in which the same conditions hold."""
    return {0} | {one[CHUNKS][0] for one in conditions} | {one[CHUNKS][1] + 1 for one in conditions} - {FOREVER + 1}
