"""Captions as conditioning without a text encoder: every word has a fixed vector, every place in the caption
another."""

import torch
from torch import Tensor

from ..errors import UserError
from .clips import COLOURS, KINDS

WORDS = ("a", "and", *COLOURS, *KINDS)
TOKENS = 8  # "a red circle and a blue square" takes seven
TEXT_DIM = 64


def _table(rows: int, seed: int) -> Tensor:
    return torch.randn(
        rows, TEXT_DIM, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
    )


_WORD_VECTORS = _table(len(WORDS) + 1, seed=1)  # the last row stands for "no word here"
_PLACE_VECTORS = _table(TOKENS, seed=2)


def embed_caption(caption: str) -> Tensor:
    """A caption to its embedding, float32 [1, 8, 64]; the empty caption is the unconditional one.

    Raises:
        UserError: for a word that the demo model was not trained on, or a caption of more than eight words.
    """
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise UserError(
            f"The demo model does not know the word '{unknown[0]}'. It knows: {', '.join(WORDS)}. "
            "Write for example 'a red circle and a blue square'."
        )
    if len(words) > TOKENS:
        raise UserError(f"The caption has {len(words)} words; the demo model takes at most {TOKENS} (two shapes).")
    rows = [WORDS.index(word) for word in words] + [len(WORDS)] * (TOKENS - len(words))
    return (_WORD_VECTORS[rows] + _PLACE_VECTORS)[None]
