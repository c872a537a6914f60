"""Videos of several shots: where one begins, positions jump in time, and its first frames stay while it lasts.

Source: LongLive 2.0 (arXiv 2605.18739), pipeline/causal_diffusion_inference.py (`_is_shot_boundary`,
`_pin_current_chunk`) and wan_5b/modules/causal_model.py (`pinned_start`, `temporal_offset`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..history.plan import MemoryPlan
from ..schedule import Given, InShot, Shot


@dataclass(frozen=True)
class ShotRule:
    """How a family makes shots.

    Attributes:
        gap: frames by which positions jump where one begins (upstream's `multi_shot_rope_offset`).
    """

    gap: int


class Shots:
    """The shots of one run.

    Args:
        rule: of the family.
        begins: says whether a chunk begins one.
        plan: of the run's memory. Where positions are relative, nothing jumps, as upstream has it.
        shot: that the run goes on in.

    Attributes:
        chunks: that have begun one in this run.
    """

    def __init__(self, rule: ShotRule, begins: Callable[[int], bool], plan: MemoryPlan, shot: Shot):
        self.gap, self.begins, self.plan, self.shot = 0 if plan.relative else rule.gap, begins, plan, shot
        self.chunks: list[int] = []

    def start(self, chunk: int) -> None:
        """Hears that a chunk begins. The first of a video begins no shot: there is none before it."""
        if chunk > 0 and self.begins(chunk):
            moved = self.shot.moved + self.gap
            self.shot = Shot(self.plan.first_frame(InShot(chunk, 0, moved)), moved)
            self.chunks.append(chunk)

    def place(self, chunk: int | Given) -> int | Given:
        """The newest chunk as one of its shot; given frames as they are."""
        if isinstance(chunk, Given) or self.shot.begins < 0:
            return chunk
        return InShot(chunk, *self.shot)
