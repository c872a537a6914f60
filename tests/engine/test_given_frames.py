"""Frames that are given and fill no chunk, chunk by chunk: a start image, an end image."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flowcache_core import generate
from flowcache_core.errors import UserError
from flowcache_core.history.positions import rotate
from flowcache_core.models.presets import PRESETS
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Compression, HistorySettings, Settings
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.tiny import TINY, watch_positions

FRAMES, SIZE, STEPS = 2, (6, 4), 4
SIGMAS = [1.0, 0.8, 0.5, 0.3, 0.0]


def draw(seed: int, frames: int) -> torch.Tensor:
    return torch.randn(1, TINY.in_dim, frames, *SIZE, generator=torch.Generator().manual_seed(seed))


def words() -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(50))


def made(backbone, chunks: int = 3, history: HistorySettings = HistorySettings(), settings: Settings = OFF, **given):
    common = dict(steps=STEPS, lag=2, frames_per_chunk=FRAMES, latent_size=SIZE, sigmas=SIGMAS)
    return generate(backbone, words(), chunks, settings=replace(settings, history=history), **(common | given))


def reference(backbone, chunks: int, lag: int, prefix: torch.Tensor | None, end: torch.Tensor | None) -> torch.Tensor:
    """One masked forward a tick over all frames: the lead sees itself; an end all that is given; a chunk both ends and
    the chunks up to itself."""
    parts = {} if prefix is None else {-1: prefix[:, :, : prefix.shape[2] % FRAMES]}
    whole = [] if prefix is None else list(prefix[:, :, prefix.shape[2] % FRAMES :].split(FRAMES, dim=2))
    parts |= {number: part for number, part in enumerate(whole) if part.shape[2]}
    done = prefix.shape[2] // FRAMES if prefix is not None else 0
    schedule = ChunkSchedule(chunks, STEPS, lag, done)
    level = dict.fromkeys(parts, 0.0)
    last = done + chunks
    if end is not None:
        parts[last], level[last] = end, 0.0
    for places in schedule:
        for place in places:
            if place.step == 0:
                parts[place.chunk] = chunk_noise(0, place.chunk, (1, TINY.in_dim, FRAMES, *SIZE))
            level[place.chunk] = SIGMAS[place.step]
        order = sorted(parts)
        x = torch.cat([parts[number] for number in order], dim=2)
        owner = torch.tensor([number for number in order for _ in range(parts[number].shape[2])])
        lead = 0 if prefix is None else prefix.shape[2] % FRAMES
        begins = {number: 0 if number == -1 else lead + number * FRAMES for number in order}
        frames = torch.cat([begins[number] + torch.arange(parts[number].shape[2]) for number in order])
        tokens = backbone.grid(*SIZE)
        each = owner.repeat_interleave(tokens[0] * tokens[1])
        asks, seen = each[:, None], each[None, :]
        given = (seen < done) | (seen == last)
        mask = torch.where(asks == last, given, (seen <= asks) | ((seen == last) & (asks >= done)))
        table = backbone.rotary.table(frames, *tokens)

        def attend(layer, q, k, v):
            return F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, attn_mask=mask)

        levels = torch.tensor([[level[int(number)] for number in owner]])
        velocity = backbone.head(x, levels, backbone.trunk(x, levels, backbone.context(words()), attend))
        for place in places:
            step = SIGMAS[place.step + 1] - SIGMAS[place.step]
            parts[place.chunk] = parts[place.chunk] + velocity[:, :, owner == place.chunk] * step
            level[place.chunk] = SIGMAS[place.step + 1]
    return torch.cat([parts[number] for number in schedule.indices], dim=2)


@pytest.mark.parametrize("before", [0, 1, 4, 5])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("lag", [2, 4])
def test_equals_one_masked_forward_a_tick(backbone, before, after, lag):
    prefix, end = (draw(seed, frames) if frames else None for seed, frames in ((1, before), (2, after)))
    ours = made(backbone, prefix=prefix, end=end, lag=lag).latents
    assert ours.shape[2] == before + 3 * FRAMES + after
    assert torch.equal(ours[:, :, :before], draw(1, before)) and torch.equal(
        ours[:, :, ours.shape[2] - after :], draw(2, after)
    )
    expected = reference(backbone, 3, lag, prefix, end)
    assert (ours[:, :, before : before + 3 * FRAMES] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "history",
    [
        HistorySettings(),
        HistorySettings(1),
        HistorySettings(1, Compression("window")),
        HistorySettings(1, relative=True),
    ],
    ids=["whole", "budget", "window", "relative"],
)
@pytest.mark.parametrize("preset", ["off", "high"])
def test_given_frames_are_seen_to_the_last_chunk(backbone, history, preset):
    """Whatever the budget drops, a start image and an end image stay."""

    def last_chunk(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        result = made(backbone, 8, history, PRESETS[preset], prefix=start, end=end)
        return result.latents[:, :, -1 - FRAMES : -1]

    usual = last_chunk(draw(1, 1), draw(2, 1))
    assert (last_chunk(draw(3, 1), draw(2, 1)) - usual).abs().max() > 1e-2
    assert (last_chunk(draw(1, 1), draw(3, 1)) - usual).abs().max() > 1e-2


def test_an_end_far_away_is_not_seen_where_positions_are_relative(backbone):
    history = HistorySettings(1, relative=True)
    results = [made(backbone, 12, history, end=draw(seed, 1)).latents for seed in (2, 3)]
    assert torch.equal(results[0][:, :, :2], results[1][:, :, :2])
    assert not torch.allclose(results[0][:, :, -4:-1], results[1][:, :, -4:-1])


def test_relative_positions_stay_near_the_window(backbone):
    seen = watch_positions(backbone)
    made(backbone, 12, HistorySettings(1, relative=True), prefix=draw(1, 1), end=draw(2, 2))
    window = 1 + (1 + 2) * FRAMES  # the lead, then the budget and the active chunks
    assert min(seen) >= 0 and max(seen) < window + 2


@pytest.mark.parametrize("relative", [False, True])
def test_going_on_behind_a_start_image_equals_one_run(backbone, relative):
    history = HistorySettings(2, relative=relative)
    whole = made(backbone, 5, history, prefix=draw(1, 1), lag=STEPS).latents
    first = made(backbone, 2, history, prefix=draw(1, 1), lag=STEPS)
    rest = made(backbone, 3, history, state=first.state, lag=STEPS).latents
    assert (rest - whole).abs().max() < 1e-4


def test_a_state_may_go_on_to_an_end_and_no_further(backbone):
    first = made(backbone, 2, prefix=draw(1, 1), lag=STEPS)
    ended = made(backbone, 2, state=first.state, end=draw(2, 1), lag=STEPS)
    assert torch.equal(ended.latents[:, :, :5], first.latents) and torch.equal(ended.latents[:, :, -1:], draw(2, 1))
    whole = made(backbone, 4, prefix=draw(1, 1), lag=STEPS).latents
    assert (ended.latents[:, :, 5:9] - whole[:, :, 5:]).abs().max() > 1e-2
    with pytest.raises(UserError, match="has its end"):
        made(backbone, 1, state=ended.state)


def test_a_smaller_budget_keeps_the_start_image_of_a_state(backbone):
    """The state's history is cut when it is loaded; it comes without queries, since its run had no budget."""
    tokens = backbone.grid(*SIZE)[0] * backbone.grid(*SIZE)[1]
    state = made(backbone, 4, prefix=draw(1, 1)).state
    (before,) = state.histories
    (after,) = made(backbone, 1, HistorySettings(1), state=state).state.histories
    assert after.keys.shape[3] < before.keys.shape[3]
    assert torch.equal(after.keys[:, :, :, :tokens], before.keys[:, :, :, :tokens])
