"""MAGI-1's prompt cleaning and special tokens against upstream's (tests/golden/README.md says how they were made)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.errors import UserError
from flowcache_core.models.magi.text import ROWS, SpecialTokens, caption_text, clean_prompt, null_text
from tests.helpers.magi_weights import SMALL, normal
from tests.helpers.paths import GOLDEN_FOLDER

GOLDEN = load_file(GOLDEN_FOLDER / "magi_text.safetensors")
PROMPTS = json.loads((GOLDEN_FOLDER / "magi_prompts.json").read_text())
WIDTH = SMALL.caption_width
CAPTION = normal("caption", (1, 1, 800, WIDTH))[0]
MASK = (torch.arange(800) < 9)[None].float()
NULL = normal("null", (800, WIDTH))


@pytest.fixture
def tokens(tmp_path) -> SpecialTokens:
    shapes = {"caption_token": (1, WIDTH), "logo_token": (1, WIDTH), "other_tokens": (100, WIDTH)}
    path = tmp_path / "special_tokens.npz"
    np.savez(path, **{name: normal(name, shape).double().numpy() for name, shape in shapes.items()})
    return SpecialTokens.from_file(path)


@pytest.mark.parametrize(("raw", "cleaned"), PROMPTS)
def test_clean_prompt(raw, cleaned):
    assert clean_prompt(raw) == cleaned


def test_the_prompts_would_notice_a_missing_step():
    assert sum(raw.lower().strip() != cleaned for raw, cleaned in PROMPTS) > 30


def test_duration_and_quality_in_front_of_the_caption(tokens):
    for chunk in range(9):
        text = caption_text(CAPTION, MASK, tokens, remaining=8 - chunk)
        assert torch.equal(text.embedding[0, :16], GOLDEN["hq.embedding"][chunk])
        assert torch.equal(text.mask[0, :16], GOLDEN["hq.mask"][chunk])
        assert text.embedding.shape == CAPTION.shape
    assert torch.equal(GOLDEN["hq.embedding"][0], GOLDEN["hq.embedding"][1])  # 7 or more to come
    assert not torch.equal(GOLDEN["hq.embedding"][1], GOLDEN["hq.embedding"][2])


def test_all_tokens_in_upstreams_order(tokens):
    names = list(ROWS)[::-1]  # the order they are asked for in does not matter
    for chunk in range(2):
        text = caption_text(CAPTION, MASK, tokens, 1 - chunk, names)
        assert torch.equal(text.embedding[0, :16], GOLDEN["all.embedding"][chunk])
        assert torch.equal(text.mask[0, :16], GOLDEN["all.mask"][chunk])


def test_a_long_caption_is_cut_at_800_tokens(tokens):
    text = caption_text(normal("long", (1, 1, 800, WIDTH))[0], torch.ones(1, 800), tokens, 0, list(ROWS))
    assert text.embedding.shape[1] == text.mask.shape[1] == 800
    assert torch.equal(text.embedding[0, -4:], GOLDEN["long.end"])


def test_empty_caption(tokens):
    text = null_text(NULL)
    shown = int(GOLDEN["null.mask"].sum())
    assert text.mask.sum() == shown and not text.captioned
    assert torch.equal(text.embedding[0], GOLDEN["null.embedding"][:shown])
    assert torch.equal(null_text(NULL, tokens).embedding[0], GOLDEN["negative.embedding"])


def test_without_special_tokens_the_caption_is_as_it_was():
    text = caption_text(CAPTION, MASK, None, 3)
    assert torch.equal(text.embedding, CAPTION) and torch.equal(text.mask, MASK)


def test_tokens_of_a_converted_checkpoint(tokens):
    stored = tokens.tensors()
    assert set(stored) == {"special_tokens.caption_token", "special_tokens.logo_token", "special_tokens.other_tokens"}
    again = SpecialTokens.from_tensors(stored)
    assert torch.equal(again.other, tokens.other)
    assert SpecialTokens.from_tensors({}) is None
    del stored["special_tokens.logo_token"]
    with pytest.raises(UserError, match="logo_token"):
        SpecialTokens.from_tensors(stored)


def test_wrong_files_are_told(tmp_path, tokens):
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, caption_token=np.array([{}], dtype=object))
    other = tmp_path / "text.npz"
    other.write_text("not an archive")
    thin = tmp_path / "thin.npz"
    np.savez(thin, caption_token=np.zeros((1, 8)), logo_token=np.zeros((1, 8)), other_tokens=np.zeros((3, 8)))
    for path, message in (
        (pickled, "not MAGI-1's"),
        (other, "not MAGI-1's"),
        (tmp_path / "none", "not MAGI-1's"),
        (thin, "3, 8"),
    ):
        with pytest.raises(UserError, match=message):
            SpecialTokens.from_file(path)
    with pytest.raises(UserError, match="48 wide and the caption 64"):
        caption_text(torch.zeros(1, 5, 64), torch.ones(1, 5), tokens, 0)
    with pytest.raises(UserError, match="no token; use the empty"):
        caption_text(CAPTION, torch.zeros(1, 800), tokens, 0)
    with pytest.raises(UserError, match="no special token 'loud'"):
        caption_text(CAPTION, MASK, tokens, 0, ["loud"])
