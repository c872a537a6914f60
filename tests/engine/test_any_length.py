"""A run may be longer than any table or buffer: positions beyond those that networks ship with, memory that stays."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import BY_FRAMES, HistorySettings, Settings
from tests.helpers.tiny import tiny_network

CHUNK, CHUNKS = 22, 50  # upstream's rotary tables hold 1,024 frames


@pytest.mark.parametrize("relative", [False, True])
def test_more_frames_than_upstreams_tables_hold(relative):
    """With a history of two chunks; the first ones are those of a short run."""
    backbone = WanBackbone(tiny_network())
    settings = Settings(history=HistorySettings(2, BY_FRAMES, relative=relative))

    def made(chunks: int):
        text = torch.ones(1, 3, backbone.text_dim)
        how = dict(family_name="causal", steps=1, sigmas=[1.0, 0.0], frames_per_chunk=CHUNK, latent_size=(2, 2), seed=3)
        return generate(backbone, text, chunks, settings=settings, **how)

    short, long = made(5), made(CHUNKS)
    assert long.latents.shape[2] == CHUNK * CHUNKS > 1024 and torch.isfinite(long.latents).all()
    assert torch.allclose(long.latents[:, :, : 5 * CHUNK], short.latents, atol=1e-4)
    assert long.latents[:, :, -5 * CHUNK :].std() == pytest.approx(float(short.latents.std()), rel=0.5)
    assert long.report.history_bytes_peak == short.report.history_bytes_peak
