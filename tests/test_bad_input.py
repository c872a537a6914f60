"""Mistakes of input to `generate` are told in one line, before anything runs."""

import itertools

import pytest
import torch

from flowcache_core import generate
from flowcache_core.engine.loop import Cancelled
from flowcache_core.errors import UserError
from flowcache_core.models.presets import preset
from flowcache_core.settings import OFF, HistorySettings, Settings
from tests.helpers.tiny import TINY

GOOD = {"steps": 4, "lag": 2, "frames_per_chunk": 2, "latent_size": (6, 4), "settings": OFF}
NAN = float("nan")


def words(width: int = TINY.text_dim, batch: int = 1) -> torch.Tensor:
    return torch.ones(batch, 5, width)


def latents(channels: int = 4, frames: int = 4, height: int = 6, width: int = 4, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, channels, frames, height, width)


def refused(backbone, text=None, chunks=2, **changes) -> str:
    """What `generate` says to input that differs from a good one."""

    class Untouched:
        """The backbone, whose network must not run."""

        channels, text_dim = backbone.channels, backbone.text_dim

    with pytest.raises(UserError) as error:
        generate(Untouched(), words() if text is None else text, chunks, **(GOOD | changes))
    message = str(error.value)
    assert "\n" not in message and len(message) < 300 and message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("prefix", "words_said"),
    [
        (latents()[0], "expected [1, 4, frames, height, width]"),
        (latents(channels=16), "expected [1, 4, frames, height, width]"),
        (latents(batch=2), "expected [1, 4, frames, height, width]"),
        (latents(frames=0), "has no frames"),
        (latents() + NAN, "NaN or infinite"),
        (latents() + float("inf"), "NaN or infinite"),
        (latents(height=0), "latent size is [0, 4]"),
    ],
)
def test_prefixes(backbone, prefix, words_said):
    assert words_said in refused(backbone, prefix=prefix)


@pytest.mark.parametrize(
    ("end", "words_said"),
    [
        (latents()[0], "expected [1, 4, frames, height, width]"),
        (latents(height=8), "The end has shape [1, 4, 4, 8, 4], expected [1, 4, frames, 6, 4]"),
        (latents(frames=0), "The end has no frames"),
        (latents() + NAN, "NaN or infinite"),
    ],
)
def test_ends(backbone, end, words_said):
    assert words_said in refused(backbone, prefix=latents(), end=end)


@pytest.mark.parametrize(
    ("text", "words_said"),
    [
        (words()[0], "expected an embedding [batch, tokens, 16]"),
        (words(width=64), "expected an embedding [batch, tokens, 16]"),
        ("a red circle", "expected an embedding"),
        ([], "empty list"),
        ([words(), words(batch=2)], "batches of 1 and 2"),
        (words() * NAN, "NaN or infinite"),
    ],
)
def test_texts(backbone, text, words_said):
    assert words_said in refused(backbone, text=text)
    if not isinstance(text, list):
        assert "negative text" in refused(backbone, negative=text, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("changes", "words_said"),
    [
        ({"chunks": 0}, "chunks is 0"),
        ({"chunks": -3}, "chunks is -3"),
        ({"steps": 0}, "steps is 0"),
        ({"lag": 5}, "lag is 5"),
        ({"lag": -1}, "lag is -1"),
        ({"frames_per_chunk": 0}, "frames_per_chunk is 0"),
        ({"latent_size": (0, 4)}, "latent size"),
        ({"latent_size": (4,)}, "latent size"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": 3.0}, "needs a negative text"),
        ({"sigmas": [1.0, 0.0]}, "do not fit 4 steps"),
        ({"sigmas": [1.0, 0.5, 0.6, 0.2, 0.0]}, "falling"),
        ({"sigmas": [1.0, 0.7, 0.6, 0.2, 0.1]}, "to 0"),
        ({"sigmas": [1.0, NAN, 0.6, 0.2, 0.0]}, "falling"),
    ],
)
def test_numbers(backbone, changes, words_said):
    assert words_said in refused(backbone, **changes)


def test_settings():
    with pytest.raises(UserError, match="There is no preset 'warp'"):
        preset("warp")
    with pytest.raises(UserError, match="budget is 0"):
        preset("balanced", 0)


def test_states_of_something_else(backbone):
    state = generate(backbone, words(), 2, **GOOD, model="this").state
    assert "made with another model" in refused(backbone, state=state, model="that")
    assert "2 frames a chunk" in refused(backbone, state=state, frames_per_chunk=1)
    assert "[batch, channels, height, width]" in refused(backbone, text=words(batch=2), state=state)
    assert "Both a state and a prefix" in refused(backbone, state=state, prefix=latents())
    with pytest.raises(UserError, match="extend with the guidance that it was made with"):
        generate(backbone, words(), 1, **GOOD, state=state, guidance_scale=2.0, negative=words())
    damaged = state._replace(histories=tuple(h._replace(keys=h.keys[1:]) for h in state.histories))
    with pytest.raises(UserError, match="state is of another model"):
        generate(backbone, words(), 1, **GOOD, state=damaged)
    poisoned = state._replace(latents=state.latents * NAN)
    assert "NaN or infinite" in refused(backbone, state=poisoned)


def test_weights_that_give_nan_are_told(backbone):
    backbone.network.blocks[1].ffn[0].bias += NAN
    with pytest.raises(UserError, match="Chunk 0 came out with NaN.*weights are damaged"):
        generate(backbone, words(), 2, **GOOD)


def test_cancel_at_any_moment_leaves_the_next_run_untouched(backbone):
    settings = GOOD | {"settings": Settings(preset("fast").reuse, history=HistorySettings(1))}
    whole = generate(backbone, words(), 3, **settings).latents
    for moment in (0, 3, 7, 11):
        asked = itertools.count()
        with pytest.raises(Cancelled):
            generate(
                backbone, words(), 3, **settings, cancelled=lambda asked=asked, moment=moment: next(asked) == moment
            )
        assert torch.equal(generate(backbone, words(), 3, **settings).latents, whole)
