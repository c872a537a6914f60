"""The demo's fixed latent space."""

import numpy as np
import torch

from flowcache_core.demo.clips import render, sample_scenes
from flowcache_core.demo.codec import LinearCodec, blocks, unblock
from flowcache_core.demo.preview import RGB_BIAS, RGB_FACTORS


def test_blocks_are_cut_and_put_back():
    video = torch.randn(2, 3, 9, 64, 64)
    cut = blocks(video)
    assert cut.shape == (2, 3, 8, 8, 768)
    assert torch.equal(unblock(cut), video)


def test_latents_are_of_unit_size_and_previews_of_the_right_colour():
    codec = LinearCodec.fit()
    video = render(sample_scenes(16, np.random.default_rng(5)), 17)
    latents = codec.encode(video)
    assert 0.8 < latents.std() < 1.2
    error = (codec.decode(latents) - video).square().mean()
    assert -10 * torch.log10(error / 4) > 27
    preview = torch.einsum("bcthw,cr->brthw", latents, torch.tensor(RGB_FACTORS))
    preview = preview + torch.tensor(RGB_BIAS).view(1, 3, 1, 1, 1)
    means = blocks(video).unflatten(-1, (3, -1)).mean(dim=-1).movedim(-1, 1)
    assert (preview - means).abs().mean() < 0.01
