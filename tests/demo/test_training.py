"""How the demo network is trained: on from a checkpoint, from its own history, and from itself under guidance."""

import numpy as np
import pytest
import torch

from flowcache_core.demo import train_network
from flowcache_core.demo.captions import embed_caption
from flowcache_core.demo.codec import LinearCodec
from flowcache_core.demo.export import export
from flowcache_core.demo.train_network import Trainer, block_causal_mask, full_attention, head_of, weights_of
from flowcache_core.models.wan import WanConfig

BATCH, CHUNKS, FRAMES = 2, 3, 9


@pytest.fixture(scope="module")
def codec():
    return LinearCodec.fit()


@pytest.fixture(autouse=True)
def small(monkeypatch, codec):
    config = WanConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64)
    monkeypatch.setattr(train_network, "CONFIG", config)
    monkeypatch.setattr(train_network, "STAGES", ((1.0, BATCH, CHUNKS),))
    monkeypatch.setattr(train_network, "CLIP_FRAMES", 12)
    monkeypatch.setattr(LinearCodec, "fit", lambda: codec)


@pytest.fixture
def trainer(tmp_path):
    made = Trainer(tmp_path / "net.pt", seed=0, pool=8, rate=1e-3)
    for weights in made.network.parameters():  # the last layer begins as zeros
        torch.nn.init.normal_(weights, std=0.1)
    made.start_from(made.network.state_dict())
    return made


def attention():
    return full_attention(
        train_network.WanBackbone(train_network.WanNetwork(train_network.CONFIG)).rotary.table(
            torch.arange(FRAMES), 4, 4
        ),
        block_causal_mask(CHUNKS, 3 * 16),
    )


def test_a_training_goes_on_from_its_checkpoint(trainer, tmp_path):
    trainer.run(3)
    assert trainer.step == 3 and trainer.pool.filled == 8
    again = Trainer(tmp_path / "net.pt", seed=1, pool=8)
    again.resume()
    assert again.step == 3 and again.seconds == trainer.seconds
    saved, averaged = weights_of(tmp_path / "net.pt"), trainer.average.state_dict()
    assert all(torch.equal(saved[name], averaged[name]) for name in saved)
    again.run(4)
    assert again.step == 4
    out = weights_of(export(tmp_path / "net.pt", tmp_path / "net.safetensors"))
    assert all((out[name] - weights).abs().max() < 1e-3 for name, weights in again.average.state_dict().items())


def test_guidance_is_learned_where_there_is_a_caption(trainer):
    trainer.learn_from(trainer.network.state_dict(), guidance=3.0)
    assert not any(weights.requires_grad for weights in trainer.teacher.network.parameters())
    text = torch.cat([embed_caption("a red circle"), embed_caption("")])
    noisy, sigmas, attend = torch.randn(BATCH, 16, FRAMES, 8, 8), torch.full((BATCH, FRAMES), 0.5), attention()
    wanted = trainer.guided(noisy, sigmas, text, attend)
    told = head_of(trainer.teacher, noisy, sigmas, trainer.teacher.context(text), attend)
    untold = head_of(
        trainer.teacher, noisy, sigmas, trainer.teacher.context(embed_caption("").expand(2, -1, -1)), attend
    )
    assert torch.allclose(wanted[0], untold[0] + 3.0 * (told[0] - untold[0]), atol=1e-5)
    assert not torch.allclose(wanted[0], told[0], atol=1e-4)
    assert torch.allclose(wanted[1], told[1], atol=1e-6)


def test_a_teacher_teaches_first_chunks_and_later_ones_learn_from_drawn_clips(trainer, monkeypatch):
    monkeypatch.setattr(train_network, "LASTING", ((BATCH, 2), (BATCH, 3)))
    monkeypatch.setattr(train_network, "STAGES", ((1.0, 4, 1),))
    trainer.learn_from(trainer.network.state_dict(), guidance=3.0)
    taken = []
    for trainer.step in range(4):
        taken.append(trainer.clips(0.5))
    assert taken == [(4, 1), (BATCH, 2), (4, 1), (BATCH, 3)]
    asked, counted = [], []
    monkeypatch.setattr(trainer, "guided", lambda noisy, *told: asked.append(noisy.shape[2]) or noisy)
    draw = train_network.sample_sigmas

    def drawn(*wanted):
        sigmas, worth = draw(*wanted)
        counted.append(worth)
        return sigmas, worth

    monkeypatch.setattr(train_network, "sample_sigmas", drawn)
    trainer.pool.add(8)
    for chunks in (1, 3):
        trainer.loss(8, chunks)
    assert asked == [3]
    assert counted[0].any() and not counted[1][:, 0].any() and counted[1].any()


def test_a_history_drifts_evenly_away_from_its_first_chunk():
    away = train_network.drift(400, CHUNKS, np.random.default_rng(0)).unflatten(2, (CHUNKS, 3))
    assert away.shape == (400, 16, CHUNKS, 3, 8, 8)
    assert torch.equal(away, away[:, :, :, :1].expand_as(away)) and not away[:, :, 0].any()
    assert torch.allclose(away[:, :, 2], 2 * away[:, :, 1])
    drifting = away.flatten(1).any(dim=1)
    assert 0.4 < drifting.float().mean() < 0.6
    corners = away[drifting][:, :, 2, :, ::7, ::7].std().item()
    assert abs(corners - train_network.DRIFT) < 0.02


def test_what_the_network_remembers_is_its_own_work(trainer):
    """A network that answers nothing leaves the noise that it was given, as much in every chunk as that chunk got."""
    with torch.no_grad():
        for weights in trainer.network.parameters():
            weights.zero_()
    clean, nothing = torch.zeros(64, 16, FRAMES, 8, 8), embed_caption("").expand(64, -1, -1)
    made = trainer.own_history(clean, trainer.backbone.context(nothing), attention())
    left = made.unflatten(2, (CHUNKS, 3)).std(dim=(1, 3, 4, 5))  # [clips, chunks]
    assert 0.28 < left.min() < 0.4 and 0.7 < left.max() < 0.82


def test_a_loss_falls(tmp_path):
    trainer = Trainer(tmp_path / "net.pt", seed=0, pool=8, rate=1e-2)

    def loss():
        torch.manual_seed(0)
        trainer.rng = np.random.default_rng(0)
        with torch.no_grad():
            return trainer.loss(8, CHUNKS).item()

    trainer.pool.add(8)
    before = loss()
    trainer.run(40)
    assert loss() < 0.95 * before
