"""What Live Prompt hangs on its condition, and how a run finds it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...flowcache_core.errors import UserError

LIVE = "flowcache_live"  # of a condition: a `LivePrompt`


@dataclass(frozen=True, repr=False)
class LivePrompt:
    """What Live Prompt hangs on its condition.

    Attributes:
        caption: that a run begins with.
        blend: chunks over which a change is blended, where the change does not say.
        node_id: of the node.
        clip: the host's text encoder, or None for the demo's captions.
        embedding: of the caption, [1, tokens, width].
        said: beside it, by the encoder.
    """

    caption: str
    blend: int
    node_id: str
    clip: Any
    embedding: Tensor
    said: dict = field(default_factory=dict)

    @property
    def conditioning(self) -> list:
        """The host's, of this prompt."""
        return [[self.embedding, self.said | {LIVE: self}]]


def live_prompt(positive: list, negative: list, steered: bool) -> LivePrompt | None:
    """Finds the Live Prompt of a run, if it has one.

    Args:
        steered: whether the run is one whose captions can change.

    Raises:
        UserError: it is there in a way that it cannot work.
    """
    if any(LIVE in more for _, more in negative):
        raise UserError(
            "A Live Prompt is connected as negative prompt, and works as the positive one; connect it there."
        )
    live = [(embedding, more[LIVE]) for embedding, more in positive if LIVE in more]
    if not live:
        return None
    embedding, prompt = live[0]
    if len(positive) > 1 or embedding is not prompt.embedding:
        raise UserError(
            "The Live Prompt is combined with another prompt, or another node has changed it; connect it straight to "
            "Autoregressive Extend."
        )
    if not steered:
        raise UserError(
            "A Live Prompt needs chunks one after another and no given end, for what the last chunk shows is not known "
            "yet; use attention 'causal' without an end, or another prompt node."
        )
    return prompt


def determining_prompt(positive: list) -> list:
    """A positive prompt as far as it tells one run from another."""
    return [[embedding, {**more, LIVE: more[LIVE].caption} if LIVE in more else more] for embedding, more in positive]
