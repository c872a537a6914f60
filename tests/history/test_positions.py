"""Where kept frames stand when positions count from the window's start."""

import pytest
import torch

from flowcache_core.history.plan import NetworkSizes, plan_memory
from flowcache_core.history.positions import Positions, rotate
from flowcache_core.models.rotary import Rotary
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HistorySettings, Settings

TOKENS = 2  # of a frame


@pytest.fixture
def positions():
    """Of a window of 6 frames: two kept chunks of 2, and the active one, which ends with the video's frame 20."""
    schedule, settings = ChunkSchedule(12, 4, 4), Settings(history=HistorySettings(2, relative=True))
    sizes, policy = NetworkSizes(1, 2, 2, 12, 24, 24), settings.reuse.policy(schedule)
    plan = plan_memory(sizes, schedule, settings, policy, grid=(1, TOKENS), chunk_frames=2)
    made = Positions(plan, Rotary(12), torch.device("cpu"))
    made.reach(20)
    return made


def numbers(*frames: list[int]) -> torch.Tensor:
    """Tokens [1, heads, N] of such frames."""
    each = torch.tensor(frames, dtype=torch.int32)[..., None] * TOKENS + torch.arange(TOKENS, dtype=torch.int32)
    return each.flatten(1)[None]


def places(positions, tokens: torch.Tensor, end: int) -> list[list[int]]:
    return positions.kept_places(tokens, end)[0, :, ::TOKENS].tolist()


def test_kept_frames_stand_one_after_another(positions):
    assert places(positions, numbers([0, 1, 16, 17]), 18) == [[0, 1, 2, 3]]  # a sink and the newest ones
    assert places(positions, numbers([14, 15, 16, 17]), 18) == [[0, 1, 2, 3]]  # the newest alone
    assert places(positions, numbers([0, 1, 16, 17, 18, 19]), 20) == [[0, 1, 2, 3, 4, 5]]  # with the chunk's own


def test_each_head_numbers_its_own(positions):
    assert places(positions, numbers([0, 1, 9, 17], [3, 15, 16, 17]), 18) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    few = positions.kept_places(torch.tensor([[[0, 1, 2, 20, 21, 34, 35], [28, 29, 30, 31, 33, 34, 35]]]), 18)
    assert few[0].tolist() == [[0, 0, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 3, 3]]


def test_a_short_history_lies_right_before_the_chunk(positions):
    assert places(positions, numbers([0, 17]), 18) == [[2, 3]]


def test_more_frames_than_places_pile_up_at_the_front(positions):
    assert places(positions, numbers([2, 5, 7, 9, 11, 17]), 18) == [[0, 0, 0, 1, 2, 3]]


def test_nothing_kept_stands_nowhere(positions):
    assert positions.kept_places(torch.zeros(1, 3, 0, dtype=torch.int32), 18).shape == (1, 3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turn_is_that_of_cosines_and_sines(dtype):
    """Of heads side by side, and of a part of them; a token's bits are the same whoever else is turned."""
    whole = torch.stack([torch.rand(7, 16).cos(), torch.rand(7, 16).sin()])
    tokens = torch.randn(2, 7, 3 * 36).to(dtype).unflatten(-1, (3, 36)).transpose(1, 2)
    for x in (tokens[..., :32], tokens[..., 4:].contiguous(), tokens[..., :12]):
        table = whole[..., : x.shape[-1] // 2]
        assert torch.equal(rotate(x, table)[:, 1:, 2:5], rotate(x[:, 1:, 2:5], table[:, 2:5]))
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = table
        turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
        made = rotate(x, table)
        assert made.dtype == dtype and torch.allclose(made.float(), turned.to(dtype).float(), atol=1e-6)
