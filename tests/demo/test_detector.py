"""The detector against clips whose content is known."""

import numpy as np
import pytest
import torch

from flowcache_core.demo.clips import render, sample_scenes
from flowcache_core.demo.codec import LinearCodec
from flowcache_core.demo.detector import detect, parse_caption


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(40, np.random.default_rng(77))


@pytest.fixture(scope="module")
def clips(scenes):
    return render(scenes, 13)


def mean_score(clips, captions):
    return np.mean([detect(clip, caption).score for clip, caption in zip(clips, captions, strict=True)])


def test_finds_what_was_drawn(clips, scenes):
    assert mean_score(clips, scenes.captions) >= 0.99


def test_bears_the_blur_of_the_linear_codec(clips, scenes):
    codec = LinearCodec.fit(clips=16)
    assert mean_score(codec.decode(codec.encode(clips)), scenes.captions) >= 0.97


def test_rejects_the_caption_of_another_clip(clips, scenes):
    assert mean_score(clips, scenes.captions[1:] + scenes.captions[:1]) < 0.15


def test_finds_nothing_in_noise():
    assert detect(torch.rand(8, 64, 64, 3), "a red circle and a white square").score == 0.0


def test_takes_images_as_well_as_clips(clips, scenes):
    clip, caption = clips[0], scenes.captions[0]
    images = (clip.movedim(0, -1) + 1) / 2
    assert torch.equal(detect(images, caption).found, detect(clip, caption).found)


def test_follows_centres_and_sizes(clips, scenes):
    for clip, caption, position in zip(clips, scenes.captions, scenes.position, strict=True):
        seen = detect(clip, caption)
        shapes = seen.centre.shape[1]
        assert np.abs(seen.centre[0].numpy() - position[:shapes]).max() < 0.5
        assert 0.9 < seen.growth < 1.1
        assert seen.jerk < 2.0


def test_a_shape_that_vanishes_counts_for_the_frames_it_is_in(clips, scenes):
    alone = next(i for i, caption in enumerate(scenes.captions) if " and " not in caption)
    clip = clips[alone].clone()
    clip[:, 8:] = -0.5
    seen = detect(clip, scenes.captions[alone])
    assert seen.per_frame.tolist() == [1.0] * 8 + [0.0] * 5


def test_a_foreign_caption_is_explained():
    assert parse_caption("a red circle and a blue square") == [(0, 0), (2, 1)]
    with pytest.raises(ValueError, match="a <colour> <kind>"):
        parse_caption("a red dog")
    with pytest.raises(ValueError, match="got \\[2, 2\\]"):
        detect(torch.zeros(2, 2), "a red circle")
