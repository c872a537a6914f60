"""Histories that are computed anew while a run goes on: finished frames are run once more, together.

LongLive does so with the newest ones when the prompt changes, so that what was seen under the old one does not hold
back the new one. Krea Realtime does so before every chunk, and keeps nothing else: what a chunk sees of frames never
comes from a forward of long ago, whose own history is gone.

Source: LongLive (arXiv 2509.22622), pipeline/interactive_causal_inference.py, `_recache_after_switch`, and
wan/modules/causal_model.py: frames of the sink are written only as long as the video is no longer than the window.
Krea Realtime, release_server.py, `recompute_kv_cache` and `get_clean_context_frames` with `keep_first_frame`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..digest import digest_of
from ..history.compression import sink_tokens
from ..history.plan import MemoryPlan
from ..settings import Compression, HistorySettings, Settings


@dataclass(frozen=True)
class Anew:
    """What of a history a family computes anew, and when.

    Attributes:
        frames: of the newest finished ones that are seen then, those of a sink included, at most so many.
        always: it is done before every chunk, for the texts of the one before, and nothing else is kept: finished
            chunks have no clean pass, and a history of another size is made of so many more or fewer frames. Else it is
            done where the prompt changes.
        first: frames of the video's beginning that are run with them, before the newest.
    """

    frames: int
    always: bool = False
    first: int = 0

    def newest(self, history: HistorySettings, chunk_frames: int) -> int:
        """Counts the newest frames whose latents are needed."""
        return (history.kept_frames(chunk_frames) or self.frames) if self.always else self.frames


def run_together(rule: Anew | None, chunk_frames: int) -> int:
    """Counts the finished frames that are run once more together at most, of a family with this rule."""
    return 0 if rule is None else chunk_frames if rule.always else rule.frames


def latents_needed(rule: Anew | None, history: HistorySettings, chunk_frames: int) -> tuple[int, int]:
    """Counts the newest frames whose latents a run that goes on needs, and those of the video's beginning."""
    return (0, 0) if rule is None else (rule.newest(history, chunk_frames), rule.first)


def held(rule: Anew | None, settings: Settings, chunk_frames: int, max_active: int = 1) -> Settings:
    """What a run keeps of its history: as it is told, but where everything is computed anew before every chunk, as many
    frames as it is told to keep, or the family's own number, counted from the window's start.

    Args:
        rule: of the family.
        settings: as they are told.
        max_active: chunks that are active at once; of several none is computed anew.
    """
    if rule is None or not rule.always or max_active > 1:
        return settings
    window = rule.newest(settings.history, chunk_frames) + chunk_frames
    compression = Compression("window", sink=rule.first)
    history = replace(settings.history, budget=None, window=window, compression=compression, relative=True)
    return replace(settings, history=history, clean_pass=False)


class Before(NamedTuple):
    """What came before a run that goes on.

    Attributes:
        latents: its newest finished frames, [B, C, T, H, W].
        shown: stands for the texts that its history was computed for; empty if not known.
        first: the frames that it began with, where the family asks for them and they are there.
    """

    latents: Tensor
    shown: str
    first: Tensor | None


class Part(NamedTuple):
    """Frames that are run together.

    Attributes:
        frames: their numbers in the video, rising.
        latents: [B, C, T, H, W].
    """

    frames: tuple[int, ...]
    latents: Tensor


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
        self.rule, self.chunk_frames = rule, plan.chunk_frames
        self.most, self.sink = rule.frames, 0  # frames
        if rule.always:
            assert kept is not None  # by `held`
            self.most = kept
        elif kept is not None:
            self.most = min(rule.frames, kept + plan.chunk_frames)
            self.sink = sink_tokens(settings.history.compression, kept * frame, frame, plan.chunk_tokens) // frame
        self.latents: Tensor | None = None if before is None else before.latents[:, :, -self.most :]
        self.first: Tensor | None = None if before is None else before.first
        self.shown, self.done = "" if before is None else before.shown, done
        self._known: tuple[list[Tensor], str] = ([], "")

    def take(self, latent: Tensor) -> None:
        """Takes frames that are finished, [B, C, T, H, W]."""
        if self.done < self.rule.first:
            begun = latent if self.first is None else torch.cat([self.first.to(latent), latent], dim=2)
            self.first = begun[:, :, : self.rule.first]
        held = latent if self.latents is None else torch.cat([self.latents.to(latent), latent], dim=2)
        self.latents, self.done = held[:, :, -self.most :], self.done + latent.shape[2]

    def show(self, texts: Sequence[Tensor]) -> bool:
        """Says whether a history must be computed anew before these texts [B, tokens, width] are shown, one for each
        branch; notes them."""
        if self.rule.always:
            return self.done > 0
        known, name = self._known
        if len(known) != len(texts) or any(a is not b for a, b in zip(known, texts, strict=True)):
            name = digest_of(list(texts))
            self._known = list(texts), name
        changed, self.shown = self.shown != name, name
        return changed and self.done > 0

    @property
    def parts(self) -> list[Part]:
        """What is run then, part after part: all of a video that the window still holds, else its beginning, where the
        family asks for it, and the newest frames, to which a sink is left as it is. Where everything is made of them,
        they see each other as chunks do. Fewer where their latents are not there."""
        if self.latents is None:
            return []
        numbers = range(self.done - min(self._wanted, self.latents.shape[2]), self.done)
        latents = self.latents[:, :, -len(numbers) :]
        begun = self.rule.first if self.first is not None and numbers[0] >= self.rule.first else 0
        frames = [*range(begun), *numbers[begun:]]
        if begun and self.first is not None:
            latents = torch.cat([self.first.to(latents), latents[:, :, begun:]], dim=2)
        together = self.chunk_frames if self.rule.always else len(frames)
        cuts = range(0, len(frames), together)
        return [Part(tuple(frames[at : at + together]), latents[:, :, at : at + together]) for at in cuts]

    @property
    def _wanted(self) -> int:
        if self.rule.always:
            return min(self.done, self.most)
        return self.done if self.done <= self.most else self.most - self.sink

    @property
    def missing(self) -> bool:
        """Whether not all of their latents are there."""
        held = 0 if self.latents is None else self.latents.shape[2]
        return held < self._wanted or (self.done > self.most and self.first is None and self.rule.first > 0)
