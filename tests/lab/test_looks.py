"""How runs look beside one another: measured on clips of which the answer is known."""

import numpy as np
import pytest
import torch

from flowcache_core.demo.clips import Scenes, render
from flowcache_core.lab import perceptual
from flowcache_core.lab.likeness import CHUNK_PIXEL_FRAMES
from flowcache_core.lab.looks import Seen
from flowcache_core.lab.motion import border_jumps, colour_drift, flows, motion_error
from flowcache_core.lab.perceptual import st_lpips, vmaf

FRAMES = 3 * CHUNK_PIXEL_FRAMES - 3


def moving(speed: float) -> torch.Tensor:
    """A white circle that goes right by so many pixels a frame, [1, 3, T, 64, 64]."""
    scenes = Scenes(
        kind=np.zeros((1, 2), int),
        colour=np.array([[6, 0]]),
        radius=np.array([[10.0, 0.0]]),
        position=np.array([[[14.0, 32.0], [0.0, 0.0]]]),
        velocity=np.array([[[speed, 0.0], [0.0, 0.0]]]),
        background=np.full((1, 2, 3), 0.2),
        angle=np.zeros(1),
    )
    return render(scenes, FRAMES)


@pytest.fixture(scope="module")
def slow():
    return moving(0.4)


def test_a_run_beside_itself_has_nothing_to_tell(slow):
    looks = Seen(slow).looks(slow)
    assert looks.motion.each == [0.0]
    assert looks.st_lpips is None or looks.st_lpips.each == [0.0]
    assert looks.vmaf is None or looks.vmaf.mean > 95
    assert looks.jumps.mean == pytest.approx(1.0, abs=0.2) and looks.colour.mean < 1.0


def test_motion_is_told_in_pixels_a_frame(slow):
    """Where the circle stands still in one of two runs, the flows are apart by its speed."""
    still = slow[:, :, :1].expand_as(slow)
    for speed in (0.4, 0.8):
        assert motion_error(flows(still), flows(moving(speed))).mean == pytest.approx(speed, rel=0.35)


def test_a_jump_shows_at_the_borders_alone(slow):
    jumps = slow.clone()
    jumps[:, :, CHUNK_PIXEL_FRAMES - 3 :] += 0.1
    inside = slow.clone()
    inside[:, :, CHUNK_PIXEL_FRAMES + 2 :] += 0.1
    assert border_jumps(jumps).mean > 3.0
    assert border_jumps(inside).mean < 1.0
    with pytest.raises(ValueError, match="two chunks"):
        border_jumps(slow[:, :, : CHUNK_PIXEL_FRAMES - 3])


def test_drift_of_one_channel_is_drift(slow):
    still = slow[:, :, :1].expand_as(slow)
    drifted = still + torch.tensor([0.0, 0.0, 0.2])[:, None, None, None] * torch.linspace(0, 1, FRAMES)[:, None, None]
    assert colour_drift(still).mean == pytest.approx(0.0, abs=1e-3)
    assert 10.0 < colour_drift(drifted).mean < 0.2 * 127.5


def test_perception_tells_noise_from_a_shift(slow):
    """ST-LPIPS forgives a shift by a pixel and does not forgive noise; VMAF falls with either."""
    pytest.importorskip("stlpips_pytorch", reason="no ST-LPIPS: pip install stlpips_pytorch")
    pytest.importorskip("imageio_ffmpeg", reason="no VMAF: pip install imageio-ffmpeg")
    noisy = (slow + 0.05 * torch.randn(slow.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    shifted = slow.roll(1, -1)
    by_noise, by_shift = st_lpips(noisy, slow), st_lpips(shifted, slow)
    assert by_noise and by_shift and by_noise.mean > 5 * by_shift.mean > 0
    scores = [vmaf(made, slow) for made in (slow, noisy, shifted)]
    assert all(scores) and scores[0].mean > 95 and max(scores[1].mean, scores[2].mean) < 90


def test_without_their_packages_the_figures_are_missing_and_no_run_fails(slow, monkeypatch):
    monkeypatch.setattr(perceptual, "_ffmpeg", lambda: None)
    monkeypatch.setattr(perceptual, "_network", lambda: None)
    looks = Seen(slow).looks(slow)
    assert (looks.st_lpips, looks.vmaf) == (None, None) and looks.as_dict()["vmaf"] is None
