"""The call that a Python user makes."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.engine.loop import Cancelled
from flowcache_core.errors import UserError
from flowcache_core.models.presets import preset
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import OFF, HistorySettings, Settings
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.tiny import TINY, tiny_network

SHORT = {"steps": 4, "lag": 2, "frames_per_chunk": 2, "latent_size": (6, 4), "settings": OFF}


def words(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def test_shapes_report_and_state(backbone):
    result = generate(backbone, words(), 3, **SHORT)
    assert result.latents.shape == (1, 4, 6, 6, 4)
    assert torch.equal(result.latents, result.state.latents)
    assert result.state.chunks == 3 and result.report.chunks_done == 3
    assert result.report.forwards_total == 3 * 4 + 3


def test_a_network_of_bfloat16_throughout(backbone):
    """Layers that do not cast, as a network of one's own has them: the latent is brought to their type."""
    network = tiny_network()
    plain = torch.nn.Conv3d(TINY.in_dim, TINY.dim, TINY.patch_size, TINY.patch_size)
    plain.load_state_dict(network.patch_embedding.state_dict())
    network.patch_embedding = plain
    half = WanBackbone(network.bfloat16())
    latents = generate(half, words().bfloat16(), 2, **SHORT).latents
    assert latents.dtype == torch.bfloat16
    exact = generate(backbone, words(), 2, **SHORT).latents
    assert (latents - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(UserError, match="text is torch.float32, expected torch.bfloat16 as the network is"):
        generate(half, words(), 2, **SHORT)


def test_a_longer_video_begins_like_a_shorter_one(backbone):
    """With one chunk at a time, a chunk sees nothing of those after it."""
    one_by_one = SHORT | {"lag": 4}
    short, long = generate(backbone, words(), 2, **one_by_one), generate(backbone, words(), 4, **one_by_one)
    assert torch.equal(short.latents, long.latents[:, :, :4])


def test_extension_goes_on_like_an_unbroken_run(backbone):
    one_by_one = SHORT | {"lag": 4, "settings": Settings(history=HistorySettings(2)), "seed": 5}
    whole = generate(backbone, words(), 5, **one_by_one)
    first = generate(backbone, words(), 2, **one_by_one)
    rest = generate(backbone, words(), 3, **one_by_one, state=first.state)
    assert rest.latents.shape == whole.latents.shape
    assert (rest.latents - whole.latents).abs().max() < 1e-5
    assert rest.report.forwards_executed == 3 * 5


def test_prefix_is_kept_and_seen(backbone):
    prefix = torch.randn(1, 4, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    result = generate(backbone, words(), 2, **SHORT, prefix=prefix)
    assert torch.equal(result.latents[:, :, :4], prefix) and result.latents.shape[2] == 8
    assert not torch.equal(result.latents, generate(backbone, words(), 2, **SHORT, prefix=-prefix).latents)


def test_a_text_for_each_chunk(backbone):
    """The last text holds on; extensions count from their own first chunk."""
    one_by_one = SHORT | {"lag": 4}
    same = generate(backbone, [words()] * 3, 3, **one_by_one)
    assert torch.equal(same.latents, generate(backbone, words(), 3, **one_by_one).latents)
    turned = generate(backbone, [words(), words(1)], 3, **one_by_one).latents
    assert torch.equal(turned[:, :, :2], same.latents[:, :, :2])
    assert not torch.equal(turned[:, :, 2:4], same.latents[:, :, 2:4])
    more = generate(backbone, [words(1)], 2, **one_by_one, state=generate(backbone, words(), 1, **one_by_one).state)
    assert (more.latents - turned).abs().max() < 1e-5


def test_guidance_changes_the_result(backbone):
    plain = generate(backbone, words(), 1, **SHORT).latents
    guided = generate(backbone, words(), 1, **SHORT, guidance_scale=3.0, negative=words(1))
    assert not torch.equal(plain, guided.latents)
    assert guided.state.branches == ("cond", "uncond")


def test_a_batch_of_videos(backbone):
    both = generate(backbone, words(batch=2), 2, **SHORT)
    assert both.latents.shape == (2, 4, 4, 6, 4)
    assert not torch.equal(both.latents[0], both.latents[1])


def test_callbacks_and_cancel(backbone):
    ticks, chunks = [], []
    generate(backbone, words(), 3, **SHORT, on_progress=ticks.append, on_chunk=chunks.append)
    assert ticks[-1].tick == ticks[-1].ticks == len(ticks) == 2 * 2 + 4
    assert [chunk.number for chunk in chunks] == [0, 1, 2]
    with pytest.raises(Cancelled):
        generate(backbone, words(), 3, **SHORT, cancelled=lambda: True)


def test_presets_run_and_save_forwards(backbone):
    options = SHORT | {"steps": 64, "lag": 16}
    del options["settings"]
    report = generate(backbone, words(), 2, **options, settings=preset("balanced")).report
    assert report.forwards_executed == 2 * (12 + 1)


def test_noise_depends_on_seed_and_chunk_only():
    shape = (1, 4, 2, 3, 3)
    assert torch.equal(chunk_noise(3, 7, shape), chunk_noise(3, 7, shape))
    drawn = [chunk_noise(seed, chunk, shape) for seed in range(3) for chunk in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
