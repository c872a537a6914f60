"""Captions for MAGI-1 from the host's text encoder."""

from ...flowcache_core.errors import UserError
from ...flowcache_core.models.magi.text import CAPTION_TOKENS
from .magi import PROMPT, Prompt

ENCODER = "t5xxl"


def encode(clip, text: str, tokens: tuple[str, ...]) -> list:
    """A conditioning with mask and `Prompt`.

    Args:
        clip: T5 v1.1 XXL with an attention mask, as the host's type 'mochi' gives it.
        text: the cleaned prompt; cut at 800 tokens, of which the last is the end.
        tokens: keys of `magi_text.ROWS`.

    Raises:
        UserError: another text encoder.
    """
    wrong = (
        "The text encoder is not T5 v1.1 XXL with a mask, which MAGI-1 needs; load t5xxl with CLIPLoader, type 'mochi'."
    )
    words = clip.tokenize(text)
    if set(words) != {ENCODER}:
        raise UserError(wrong)
    (row,) = words[ENCODER]
    if len(row) > CAPTION_TOKENS:
        row = [*row[: CAPTION_TOKENS - 1], row[-1]]
    conditioning = clip.encode_from_tokens_scheduled({ENCODER: [row]})
    if any("attention_mask" not in more for _, more in conditioning):
        raise UserError(wrong)
    return [[embedding, {**more, PROMPT: Prompt(text, tokens)}] for embedding, more in conditioning]
