"""Pictures have the right size, the right colours in the right places, and cope with every report."""

import numpy as np
import pytest
import torch

from flowcache_core import generate
from flowcache_core.media import pictures
from flowcache_core.models.presets import PRESETS
from flowcache_core.report import Report
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HistorySettings, Settings
from tests.helpers.tiny import TINY


def made_report(chunks: int, steps: int = 8, branches=("cond",), every: int = 2) -> Report:
    report = Report(ChunkSchedule(chunks, steps, steps), settings="made up")
    for branch in branches:
        for chunk in range(chunks):
            for step in range(steps):
                report.record(chunk, [branch], step % every == 0)
    report.history = [(tick, 1000 * min(tick, 20)) for tick in range(chunks * steps)]
    report.history_bytes_unbounded, report.chunks_done = 1000 * chunks * steps, chunks
    return report


def share(image, colour: str) -> float:
    """Of the picture's pixels, how many have about this colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(np.asarray(image).astype(int) - rgb).max(axis=-1) < 8).mean()


@pytest.mark.parametrize("chunks", [1, 3, 16, 700])
@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
def test_report_picture_of_any_length(chunks, branches):
    image = pictures.report_picture(made_report(chunks, branches=branches))
    assert image.mode == "RGB" and image.width == 800 and 300 < image.height < 1500


def test_map_shows_the_decisions():
    half = pictures.report_picture(made_report(16, 64, every=2))
    few = pictures.report_picture(made_report(16, 64, every=8))
    none = pictures.report_picture(made_report(16, 64, every=1))
    shares = [share(image, pictures.RECOMPUTED) for image in (few, half, none)]
    assert shares[0] * 2.5 < shares[1] < 0.6 * shares[2]
    assert share(none, pictures.REUSED) < 0.002 < share(half, pictures.REUSED)


def test_an_empty_report_is_a_picture_too():
    assert pictures.report_picture(Report(ChunkSchedule(1, 1, 1))).width == 800


def test_a_real_run(backbone):
    settings = Settings(PRESETS["balanced"].reuse, history=HistorySettings(2))
    text = torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(0))
    report = generate(
        backbone, text, 4, steps=16, lag=4, frames_per_chunk=2, latent_size=(6, 4), settings=settings
    ).report
    assert pictures.report_picture(report).width == 800
    kept = report.as_dict()
    assert len(kept["history_bytes"]) == 3 * 4 + 16 and max(kept["history_bytes"]) == kept["history_bytes_peak"]


def test_comparison_and_side_by_side():
    frames = np.zeros((21, 32, 32, 3), dtype=np.uint8)
    frames[:, :, :, 1] = 200
    runs = [pictures.Run(name, made_report(2), frames, ["a fact"]) for name in ("plain", "FlowCache", "short")]
    image = pictures.comparison_picture("Title", "subtitle", runs, [("1.0x", "faster")])
    assert image.width == 800 and share(image, "#00c800") > 0.05
    together = pictures.side_by_side([(run.name, run.frames) for run in runs], chunk_frames=12)
    assert len(together) == 21 and together[0].size == (3 * (128 + 16) + 16, 128 + 54)
    assert share(together[0], "#00c800") > 0.5
    assert together[8].tobytes() != together[9].tobytes()  # the clock


@pytest.mark.parametrize("peak", [0.003, 0.58, 1.0, 7.3, 24.0, 99.0, 1023.0])
def test_axes_hold_their_peak_with_few_marks(peak):
    most, marks = pictures.axis_marks(peak)
    assert most >= peak and most <= 2.6 * peak and 2 <= len(marks) <= 7 and marks[0] == 0


def test_places_to_number():
    assert pictures._ticks(64, 9) == [0, 7, 15, 23, 31, 39, 47, 55, 63]
    assert pictures._ticks(1, 9) == [0]
    assert all(len(pictures._ticks(count, 9)) <= 10 for count in range(1, 2000, 7))
