"""Conditions that hold for some chunks only: what Prompts over Time gives, as the host's guider meets it."""

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
        self._known: dict[tuple, int] = {}
        for side, held in conditions.items():
            for what in (name for one in held or [] for name in WHOLE if one.get(name) is not None):
                raise UserError(
                    f"The {side} prompt brings '{what}', which is for a whole video and does not go with chunks; leave "
                    f"that node out (images are given as a prefix)."
                )

    def of(self, chunk: int) -> tuple[Conditions, int]:
        """What holds for a chunk, and a number that tells it from what holds for others.

        A side's n-th condition keeps one uuid for all chunks, since branches of guidance are told apart by it.
        """
        chosen, said = {}, []
        for side, conditions in self.conditions.items():
            conditions = conditions or []
            held = [one for one in conditions if _holds(one, chunk)]
            if conditions and not held:
                raise UserError(f"No {side} prompt holds for chunk {chunk}; connect one that does.")
            said.append(tuple(one["uuid"] for one in held))
            chosen[side] = [one | {"uuid": first["uuid"]} for one, first in zip(held, conditions, strict=False)]
        return chosen, self._known.setdefault(tuple(said), len(self._known))

    def refuse(self, what: str) -> None:
        """Raises UserError where a condition is limited to some chunks."""
        if any(CHUNKS in one for conditions in self.conditions.values() for one in conditions or []):
            raise UserError(f"Prompts over time need chunks one after another, not {what}; connect a single prompt.")


def _holds(condition: dict, chunk: int) -> bool:
    first, last = condition.get(CHUNKS, (0, FOREVER))
    return first <= chunk <= last
