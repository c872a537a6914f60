"""Histories that are computed anew while a run goes on: the newest finished frames are run once more, together.

LongLive does so when the prompt changes, so that what was seen under the old one does not hold back the new one.

Source: LongLive (arXiv 2509.22622), pipeline/interactive_causal_inference.py, `_recache_after_switch`, and
wan/modules/causal_model.py: frames of the sink are written only as long as the video is no longer than the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..digest import digest_of
from ..history.compression import sink_tokens
from ..history.plan import MemoryPlan
from ..settings import Settings


@dataclass(frozen=True)
class Anew:
    """What of a history a family computes anew where the prompt changes.

    Attributes:
        frames: of the newest finished ones that are seen then, those of a sink included, at most so many.
    """

    frames: int


class Before(NamedTuple):
    """What came before a run that goes on.

    Attributes:
        latents: its newest finished frames, [B, C, T, H, W].
        shown: stands for the texts that its history was computed for; empty if not known.
    """

    latents: Tensor
    shown: str

    @classmethod
    def of(cls, rule: Anew, latents: Tensor, shown: str) -> "Before":
        """Keeps what a rule asks for of all finished frames that are there."""
        return cls(latents[:, :, -rule.frames :], shown)


class AnewHistory:
    """Which finished frames are run once more when, and their latents.

    Args:
        rule: of the family.
        plan, settings: of the run.
        before: that the run goes on from, or None.
        done: finished frames that are there already.
    """

    def __init__(self, rule: Anew, plan: MemoryPlan, settings: Settings, before: Before | None, done: int):
        kept, frame = settings.history.kept_frames(plan.chunk_frames), plan.frame_tokens
        self.most, self.sink = rule.frames, 0  # frames
        if kept is not None:
            self.most = min(rule.frames, kept + plan.chunk_frames)
            self.sink = sink_tokens(settings.history.compression, kept * frame, frame, plan.chunk_tokens) // frame
        self.latents: Tensor | None = None if before is None else before.latents[:, :, -self.most :]
        self.shown, self.done = "" if before is None else before.shown, done
        self._known: tuple[list[Tensor], str] = ([], "")

    def take(self, latent: Tensor) -> None:
        """Takes frames that are finished, [B, C, T, H, W]."""
        held = latent if self.latents is None else torch.cat([self.latents.to(latent), latent], dim=2)
        self.latents, self.done = held[:, :, -self.most :], self.done + latent.shape[2]

    def show(self, texts: Sequence[Tensor]) -> bool:
        """Says whether a history must be computed anew before these texts [B, tokens, width] are shown, one for each
        branch; notes them."""
        known, name = self._known
        if len(known) != len(texts) or any(a is not b for a, b in zip(known, texts, strict=True)):
            name = digest_of(list(texts))
            self._known = list(texts), name
        changed, self.shown = self.shown != name, name
        return changed and self.done > 0

    @property
    def frames(self) -> tuple[int, ...]:
        """Numbers of the frames that are run then: all of a video that the window still holds, else the newest, to
        which the sink is left as it is. Fewer where their latents are not there."""
        held = 0 if self.latents is None else self.latents.shape[2]
        return tuple(range(self.done - min(self._wanted, held), self.done))

    @property
    def _wanted(self) -> int:
        return self.done if self.done <= self.most else self.most - self.sink

    @property
    def missing(self) -> bool:
        """Whether their latents are not all there."""
        return len(self.frames) < self._wanted
