"""A run that is told something between its ticks: other texts for chunks that have not begun, or to end."""

import pytest
import torch

from flowcache_core import Change, generate, preset
from flowcache_core.engine.loop import Boundary
from flowcache_core.errors import UserError
from flowcache_core.models.magi.text import caption_text
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import OFF
from tests.helpers.magi_runs import BASE, magi_run, tokens
from tests.helpers.magi_weights import normal
from tests.helpers.tiny import TINY, tiny_network

CHUNKS, STEPS = 5, 8


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def made(texts, lag: int, settings=OFF, **more):
    return generate(
        WanBackbone(tiny_network()), texts, more.pop("chunks", CHUNKS), steps=STEPS, lag=lag, settings=settings,
        frames_per_chunk=2, latent_size=(6, 4), guidance_scale=3.0, negative=text(9), **more,
    )  # fmt: skip


def at(chunk: int, change: Change):
    """Says so once, when no chunk from this one on has begun; and what the run told between its ticks."""
    told: list[Boundary] = []

    def steer(ahead: Boundary) -> Change | None:
        told.append(ahead)
        first = ahead.chunk == chunk and not any(one.chunk == chunk for one in told[:-1])
        return change if first else None

    return steer, told


def same(one: torch.Tensor, other: torch.Tensor, lag: int) -> bool:
    """To the bit, or up to rounding where other chunks went through the same products."""
    return one.shape == other.shape and torch.allclose(one, other, 0.0, 0.0 if lag == STEPS else 1e-4)


@pytest.mark.parametrize(
    ("lag", "settings"), [(STEPS, OFF), (2, OFF), (2, preset("balanced", budget=2))], ids=["one", "several", "budget"]
)
def test_a_text_holds_from_the_next_chunk_to_the_bit(lag, settings):
    steer, told = at(3, Change(text(1)))
    steered = made(text(0), lag, settings, steer=steer)
    assert torch.equal(steered.latents, made([*[text(0)] * 3, text(1)], lag, settings).latents)
    assert not torch.equal(steered.latents, made(text(0), lag, settings).latents)
    assert [one.chunk for one in told if one.begins] == list(range(CHUNKS))
    assert told[-1].chunk == CHUNKS - (lag == STEPS and told[-1].begins)


@pytest.mark.parametrize("lag", [STEPS, 2])
def test_a_stopped_run_is_the_beginning_of_the_whole_and_goes_on(lag):
    whole, heard = made(text(0), lag), []
    steer, _ = at(3, Change(stop=True))
    short = made(text(0), lag, steer=steer, on_chunk=lambda chunk: heard.append(chunk.number))
    count = 3 if lag == STEPS else 1  # between two chunks at once, else with the one that was under way
    assert heard == list(range(count)) and short.report.chunks_done == count
    assert torch.equal(short.latents, whole.latents[:, :, : 2 * count])
    assert short.report.notes[-1] == f"stopped after {count} of {CHUNKS} chunks"
    alone = made(text(0), lag, chunks=count)
    for mine, theirs in zip(short.state.histories, alone.state.histories, strict=True):
        assert all(same(*pair, lag) for pair in zip(mine, theirs, strict=True))
    on = made(text(0), STEPS, chunks=1, state=short.state)
    assert same(on.latents, made(text(0), STEPS, chunks=1, state=alone.state).latents, lag)


def test_what_was_shown_before_is_let_go(monkeypatch):
    """Another text at every tick keeps no more of them than chunks that are under way."""
    from flowcache_core import generation

    kept = []
    steered = generation.Shown.steered
    monkeypatch.setattr(
        generation.Shown, "steered", lambda shown, ahead: steered(shown, ahead) or kept.append(len(shown.changed))
    )
    made(text(0), 2, chunks=12, steer=lambda ahead: Change(text(ahead.chunk)))
    assert max(kept) <= STEPS // 2 + 2


def test_what_cannot_be_steered_is_told():
    with pytest.raises(UserError, match="leave 'steer' out"):
        made(text(0), 2, seeing="joint", steer=lambda ahead: None)
    with pytest.raises(UserError, match="expected an embedding"):
        made(text(0), 2, steer=lambda ahead: Change(torch.zeros(1, 5, 3)))


def test_magi_changes_its_caption_and_leaves_a_whole_state_where_it_is_stopped():
    captions = normal("caption", (1, 1, 800, BASE.caption_width))[0], normal("other", (1, 800, BASE.caption_width))
    mask, special = (torch.arange(800) < 9)[None], tokens(BASE.caption_width)

    def run(changed_at, **more):
        told = lambda chunk: caption_text(captions[changed_at(chunk)], mask, special, 6 - chunk)  # noqa: E731
        return magi_run("base", text=told, steps=4, **more)

    shown = dict.fromkeys(range(7), 0)
    steer = lambda ahead: ahead.chunk == 4 and shown.update(dict.fromkeys(range(4, 7), 1))  # noqa: E731
    steered = [chunk.latent for chunk in run(shown.__getitem__, steer=lambda ahead: bool(steer(ahead))).run()]
    plain = run(lambda chunk: chunk >= 4)
    assert all(torch.equal(*pair) for pair in zip(steered, (chunk.latent for chunk in plain.run()), strict=True))

    stopped = run(lambda chunk: chunk >= 4, steer=lambda ahead: ahead.chunk == 6)
    assert all(torch.equal(a.latent, b) for a, b in zip(stopped.run(), steered, strict=False))
    done = stopped.report.chunks_done
    assert 2 <= done < 7
    (clean,) = stopped.save().values()
    seen = min(done, stopped.forward.seen_by_next) * stopped.forward.plan.chunk_tokens
    newest = stopped.forward.plan.chunk_tokens * done
    assert clean.tokens[0, 0, 0].tolist() == list(range(newest - seen, newest))
