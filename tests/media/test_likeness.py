"""Two videos next to each other: views, scores a frame, and their words and picture."""

import math

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.media.likeness import GAP, Likeness, common, likeness, side_by_side, wipe
from flowcache_core.media.metrics import psnr
from flowcache_core.media.pictures import likeness_picture
from flowcache_core.report import clock, share_of


def video(seed: int, frames: int = 6) -> torch.Tensor:
    return torch.rand(frames, 16, 24, 3, generator=torch.Generator().manual_seed(seed))


def test_scores_are_of_each_frame():
    first, second = video(0), video(0)
    second[3] = (second[3] + 0.1).clamp(0, 1)
    found = likeness(first, second)
    assert [math.isinf(one) for one in found.psnr] == [True, True, True, False, True, True]
    assert found.psnr[3] == pytest.approx(psnr(first[3], second[3]))
    assert found.ssim[3] < 1 and found.ssim[:3] == pytest.approx([1.0] * 3)
    assert "frame 4" in found.text() and "5 of them equal" in found.text()
    assert likeness(first, first).text() == "The 6 frames are equal."


def test_side_by_side_holds_both():
    both = side_by_side(video(0), video(1))
    assert torch.equal(both[:, :, :24], video(0)) and torch.equal(both[:, :, 24 + GAP :], video(1))


def test_wipe_goes_from_one_to_the_other_and_back():
    first, second = video(0, 8), video(1, 8)
    mixed = wipe(first, second)
    assert torch.equal(mixed[0], first[0])
    assert torch.equal(mixed[4, :, 2:], second[4, :, 2:])
    assert torch.equal(mixed[2, :, :12], first[2, :, :12]) and torch.equal(mixed[2, :, 14:], second[2, :, 14:])
    assert torch.equal(second, video(1, 8))


def test_longer_videos_are_cut_and_other_sizes_refused():
    first, second = common(video(0, 6), video(1, 4))
    assert len(first) == len(second) == 4
    with pytest.raises(UserError, match="24 x 16 and 16 x 16"):
        common(video(0), video(0)[:, :, :16])


def test_picture_shows_the_values():
    high, low = (likeness_picture(Likeness([value] * 5, [0.9] * 5)) for value in (40.0, 10.0))
    assert high.width == 800 and high.tobytes() != low.tobytes()
    for odd in (Likeness([math.inf] * 3, [1.0] * 3), Likeness([30.0], [0.5]), Likeness([math.inf, 20.0], [1.0, -0.1])):
        assert likeness_picture(odd).height > 300


def test_sizes_and_times_as_people_say_them():
    assert share_of(1288490188, 2 * 2**30) == "1.2 of 2.0 GB"
    assert share_of(3 * 2**20, 5 * 2**20) == "3.0 of 5.0 MB"
    assert [clock(seconds) for seconds in (9.4, 75, 7300)] == ["9 s", "1 min 15 s", "2 h 1 min"]
