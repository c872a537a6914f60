"""What earlier versions stored is gone on from, or refused in a line (made as tests/released/README.md says)."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core import generate
from flowcache_core.engine.loop import Chunk
from flowcache_core.errors import UserError
from flowcache_core.history.snapshot import SnapshotDelta
from flowcache_core.models.magi.forward import SHARED, magi_schedule
from flowcache_core.models.magi.text import caption_text
from flowcache_core.models.presets import quality_settings
from flowcache_core.reuse.calibration import Calibration, Measured
from flowcache_core.settings import BY_FRAMES, OFF, HistorySettings
from flowcache_core.storage.calibrations import load_calibration
from flowcache_core.storage.run_folder import RunFolder
from flowcache_core.storage.state import FORMAT, load_state
from tests.helpers.golden_runs import relative_error
from tests.helpers.histories import text
from tests.helpers.magi_runs import FRAMES, RUNS, magi_run, tokens
from tests.helpers.magi_weights import normal
from tests.helpers.paths import ROOT
from tests.helpers.runs import video

RELEASED = ROOT / "tests" / "released" / "0.1.0"
LATER = load_file(RELEASED / "later.safetensors")
(RUN,) = (RELEASED / "runs").iterdir()
KEPT = {  # history settings, lag
    "whole": (HistorySettings(), 2),
    "budget": (HistorySettings(2, BY_FRAMES), 2),
    "relative": (HistorySettings(2, relative=True), 6),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_state_goes_on_to_what_its_own_version_made_of_it(backbone, name):
    """With a budget the next chunk alone is the same: later cuts ask with other queries than 0.1.0 did. With relative
    positions it is near: kept frames follow one another now, where 0.1.0 piled the older ones up at 0."""
    state, (kept, lag) = load_state(RELEASED / f"state_{name}.safetensors"), KEPT[name]
    longer = generate(
        backbone, text(0), 3, steps=6, lag=lag, settings=replace(OFF, history=kept), seed=4, frames_per_chunk=2,
        guidance_scale=2.0, negative=text(1), state=state, model="tiny",
    )  # fmt: skip
    frames, new = state.latents.shape[2], LATER[name].shape[2]
    assert longer.latents.shape[2] == frames + 6 and longer.state.chunks == 7
    assert torch.equal(longer.latents[:, :, :frames], state.latents)
    assert relative_error(longer.latents[:, :, frames : frames + new], LATER[name]) < (2e-2 if kept.relative else 1e-5)


def test_a_magi_state_goes_on_to_what_its_own_version_made_of_it():
    state = load_state(RELEASED / "state_magi.safetensors")
    config, chunks, steps, _, _ = RUNS["base"]
    caption = normal("caption", (1, 1, config.caption_tokens, config.caption_width))[0]
    shown = caption_text(
        caption, (torch.arange(config.caption_tokens) < 9)[None], tokens(config.caption_width), chunks - 1
    )
    run = magi_run(
        "base",
        schedule=magi_schedule(2 * FRAMES, steps, state.frames),
        given=state.latents,
        loaded=state.by_branch[SHARED],
        text=lambda chunk: shown,
        start=lambda chunk: normal(f"noise{chunk}", (*state.latents.shape[:2], FRAMES, *state.latents.shape[3:])),
    )
    assert relative_error(video(run), LATER["magi"]) < 1e-5


def folder(root, model: str = "tiny") -> RunFolder:
    return RunFolder(root, RUN.name, 2**30, first=0, chunk_frames=2, model=model)


def test_an_interrupted_run_starts_anew_and_says_so(tmp_path):
    shutil.copytree(RUN, tmp_path / RUN.name)
    assert folder(tmp_path).load() is None and folder(tmp_path).outdated()
    assert not folder(tmp_path, model="another").outdated() and not folder(tmp_path / "none").outdated()
    (tmp_path / RUN.name).rename(tmp_path / "holiday")  # no name of a run
    assert not folder(tmp_path).outdated()
    damaged = tmp_path / RUN.name / "history-00000.safetensors"
    damaged.parent.mkdir()
    for state in ("no json", "[]"):
        save_file({"latents": torch.zeros(1)}, damaged, metadata={"format": FORMAT, "state": state})
        assert not folder(tmp_path).outdated()


def test_runs_of_this_version_are_not_outdated(tmp_path):
    shutil.copytree(RUN, tmp_path / RUN.name)
    kept, state = folder(tmp_path), load_state(RUN / "history-00000.safetensors")
    kept.add(Chunk(0, state.latents), SnapshotDelta(state.by_branch, full=True))
    assert not folder(tmp_path).outdated() and folder(tmp_path).load().chunks == 1


def test_a_calibration_is_read():
    assert load_calibration(RELEASED / "network.flowcache.json") == Calibration(
        64, 16, 6, 3, (Measured((0, 4, 16, 40, 60), 34.5), Measured((0, 2, 4, 9, 20, 40, 60), 38.25))
    )
    assert quality_settings("balanced", load_calibration(RELEASED / "network.flowcache.json")).reuse.made_for == (
        64,
        16,
    )


def test_a_state_of_another_model_is_refused_in_a_line(backbone):
    state = load_state(RELEASED / "state_whole.safetensors")
    with pytest.raises(UserError, match=r"made with another model \(tiny, this one is demo\); use that model"):
        generate(backbone, text(0), 1, frames_per_chunk=2, state=state, model="demo")
