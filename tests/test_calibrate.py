"""Calibration of a model from Python: on some texts searched, on others measured, and written beside the model."""

from dataclasses import replace

import pytest
import torch

from flowcache_core.calibration import calibrate, calibrate_clips, likeness
from flowcache_core.demo import embed_caption
from flowcache_core.errors import UserError
from flowcache_core.models.presets import quality_settings
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF
from flowcache_core.storage.calibrations import calibration_of, calibration_path, fingerprint, save_calibration

SMALL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64)
QUICK = {"steps": 8, "lag": 2, "chunks": 2, "minutes": 0.0, "counts": (3, 5)}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return WanBackbone(WanNetwork(SMALL).requires_grad_(False))


def test_a_model_is_calibrated_and_gives_what_was_measured(backbone, tmp_path):
    shapes, lines = [], []

    def decode(latents):
        shapes.append(latents.shape)
        return latents

    texts = [embed_caption(caption) for caption in ("a red circle", "a blue square", "a green triangle")]
    made = calibrate(backbone, texts, decode=decode, told=lines.append, **QUICK)
    assert (made.steps, made.lag, made.chunks, made.clips) == (8, 2, 2, 1)  # searched on two of them
    assert [len(one.steps) for one in made.curve] == [3, 5] and made.curve[1].psnr > made.curve[0].psnr > 20
    assert set(shapes) == {(1, 16, 6, 8, 8)} and len(lines) == 4
    model = tmp_path / "model.safetensors"
    model.write_bytes(bytes(range(256)) * 100)
    assert calibration_of(model) is None
    save_calibration(made, calibration_path(model), model)
    assert calibration_of(model) == replace(made, weights=fingerprint(model))
    with model.open("r+b") as file:
        file.seek(20_000)
        file.write(b"another weight")
    with pytest.raises(UserError, match="other weights .*; calibrate the model again, or delete that file"):
        calibration_of(model)
    chosen = made.choose(0.0)
    assert chosen is not None
    assert quality_settings(0.0, made).reuse.policy(ChunkSchedule(2, 8, 2)).recomputed(8) == {*chosen.steps}


def test_one_text_is_measured_with_other_noise(backbone):
    seen = []

    def decode(latents):
        seen.append(latents)
        return latents

    made = calibrate(backbone, [embed_caption("a red circle")], decode=decode, **QUICK)
    assert made.clips == 1
    plain = [one for one in seen if torch.equal(one, seen[0])]
    assert len(plain) == 1 and not any(torch.equal(seen[0], other) for other in seen[1:])


def test_clips_of_the_caller_are_made_for_both_parts():
    made_for = []

    def make(settings, number):
        made_for.append((settings, number))
        clips = torch.zeros(2 + number, 3, 4)
        clips[0] += 0.0 if settings == OFF else 0.01  # 40 dB; the others are equal, which counts as 100
        return clips

    made = calibrate_clips(ChunkSchedule(2, 8, 4), make, 0.0, counts=(2, 4))
    # More steps that are no better are not offered.
    assert [(len(one.steps), one.psnr) for one in made.curve] == [(2, pytest.approx((40.0 + 2 * 100.0) / 3, abs=0.01))]
    assert made.clips == 3
    assert [number for settings, number in made_for if settings == OFF] == [0, 1]  # the plain run is made once


def test_likeness_is_the_mean_of_the_clips():
    plain = torch.zeros(2, 3, 4)
    assert likeness(plain, plain) == 100.0
    assert likeness(plain + 0.1, plain) == pytest.approx(20.0, abs=1e-4)
    assert likeness(plain + 0.1, plain, span=10.0) == pytest.approx(40.0, abs=1e-4)


def test_what_cannot_be_calibrated_is_told(backbone):
    with pytest.raises(UserError, match="no text"):
        calibrate(backbone, [], decode=lambda latents: latents)
    with pytest.raises(UserError, match="too few to leave any out"):
        calibrate(backbone, [embed_caption("a red circle")], decode=lambda x: x, **QUICK | {"steps": 3, "lag": 1})
