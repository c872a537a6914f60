"""PSNR and SSIM against cases that can be worked out by hand, and SSIM against scikit-image's."""

import math

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.media.metrics import psnr, ssim


def clip(seed: int = 0, frames: int = 3, size: int = 24) -> torch.Tensor:
    return torch.rand(3, frames, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand():
    a = torch.zeros(3, 2, 4, 4)
    assert psnr(a, a + 0.1) == pytest.approx(20.0)  # mean square 0.01
    assert psnr(a, a + 0.2, span=2.0) == pytest.approx(20.0)
    half = a.clone()
    half[:, 0] = 0.1
    assert psnr(a, half) == pytest.approx(20.0 + 10 * math.log10(2))
    assert psnr(a, a) == math.inf


def test_ssim_of_equal_videos_is_one_and_of_opposites_is_low():
    a = clip()
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, 1 - a) < -0.5
    assert ssim(a, clip(1)) < 0.1


def test_ssim_of_flat_frames_by_hand():
    """Without variance only the means count: (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b, c1 = 0.4, 0.7, 0.01**2
    flat = torch.ones(3, 2, 16, 16)
    assert ssim(a * flat, b * flat) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


def test_ssim_of_a_scaled_copy_by_hand():
    """One window of an 11 x 11 frame of zero mean: b = s * a gives (2 s v + c2) / (v + s^2 v + c2)."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    frame = torch.randn(11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frame = frame - (weights * frame).sum()
    v, s, c2 = (weights * frame.square()).sum().item(), 0.5, 0.03**2
    found = ssim(frame.expand(1, 1, 11, 11), s * frame.expand(1, 1, 11, 11))
    assert found == pytest.approx((2 * s * v + c2) / (v + s * s * v + c2), abs=1e-9)


def test_ssim_is_the_mean_over_frames_and_does_not_care_for_span():
    a, b = clip(0), clip(0) * 0.8
    b[:, 1] = clip(5)[:, 1]
    each = [ssim(a[:, i : i + 1], b[:, i : i + 1]) for i in range(3)]
    assert ssim(a, b) == pytest.approx(sum(each) / 3)
    assert ssim(2 * a, 2 * b, span=2.0) == pytest.approx(ssim(a, b))


@pytest.mark.parametrize("span", [1.0, 2.0])
def test_ssim_is_scikit_images(span):
    """Whose mean, too, leaves out the windows that reach over a frame's edge."""
    reason = "scikit-image, whose SSIM ours is compared with, is not installed (`make test` installs it)"
    structural_similarity = pytest.importorskip("skimage.metrics", reason=reason).structural_similarity
    a = clip(0, 4, 40)[..., :24].cumsum(-1).cumsum(-2)
    a = span * (a / a.amax() - 0.5)
    noise = torch.linspace(0, 0.3, 4)[:, None, None] * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    b = (a + span * noise).clamp(-span / 2, span / 2)
    planes = zip(a.flatten(0, 1).double().numpy(), b.flatten(0, 1).double().numpy(), strict=True)
    theirs = [
        structural_similarity(
            *pair, data_range=span, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, K1=0.01, K2=0.03
        )
        for pair in planes
    ]
    assert min(theirs) < 0.3 and max(theirs) == pytest.approx(1.0)
    assert ssim(a, b, span) == pytest.approx(sum(theirs) / len(theirs), abs=1e-7)


def test_long_videos_are_taken_in_parts():
    a, b = clip(0, 50, 12), clip(1, 50, 12)
    assert ssim(a, b) == pytest.approx(sum(ssim(a[:, i : i + 1], b[:, i : i + 1]) for i in range(50)) / 50)


def test_wrong_shapes_are_told():
    with pytest.raises(UserError, match="same size"):
        psnr(clip(), clip(frames=2))
    with pytest.raises(UserError, match="at least 11 x 11"):
        ssim(clip(size=8), clip(size=8))
