"""What Windows does otherwise, pretended: all that is written and read again there too."""

import json

import numpy as np
import pytest
import torch

from flowcache_core import checkpoints
from flowcache_core.errors import UserError
from flowcache_core.history import room
from flowcache_core.media.video_stream import VideoStream
from flowcache_core.storage.state import load_state, make_state, save_state
from tests.helpers.windows import is_held, pretend_windows
from tests.storage.test_run_folder import folder, one, run


def test_a_kept_run_goes_on_although_its_files_are_mapped(tmp_path, monkeypatch):
    pretend_windows(monkeypatch)
    kept = folder(tmp_path)
    for index in range(2):
        kept.add(*one(index=index))
    again = folder(tmp_path)
    state = again.load()
    assert state.chunks == 2
    again.latent(0), again.latent(1)
    chunk, grown = one(index=2)
    again.add(chunk, grown._replace(full=True))  # a cut: all that was written before is replaced
    assert folder(tmp_path).load().chunks == 3 and state.latents.isfinite().all()
    again.add(*one(index=3))
    assert folder(tmp_path).load().chunks == 4


def test_a_video_is_made_and_goes_on_from_its_file(backbone, tmp_path, monkeypatch):
    """Without fork, links or a number of pages; what does not fit is not known there, and nothing is refused."""
    expected = run(backbone, 2)
    pretend_windows(monkeypatch)
    assert room.system_memory() is None
    made = run(backbone, 2)
    assert torch.equal(made.latents, expected.latents)
    save_state(made.state, tmp_path / "a.safetensors")
    loaded = load_state(tmp_path / "a.safetensors")
    assert run(backbone, 1, state=loaded).state.chunks == 3


def test_a_file_that_is_in_use_is_not_replaced_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_state(make_state(torch.ones(1, 4, 2, 6, 4), {}, 2), path)
    pretend_windows(monkeypatch)
    loaded = load_state(path)
    assert is_held(path)
    with pytest.raises(UserError, match=r"Cannot write .*a.safetensors \(.*\); .*close what has it open") as caught:
        save_state(loaded._replace(latents=2 * loaded.latents), path)
    assert "\n" not in str(caught.value) and loaded.latents.eq(1).all()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def frames(number: int) -> np.ndarray:
    return np.full((1, 16, 16, 3), 40 * number, np.uint8)


@pytest.mark.parametrize("player", [False, True])
def test_a_streamed_video_is_whole_or_plays(tmp_path, monkeypatch, player):
    path = tmp_path / "a.mp4"
    pretend_windows(monkeypatch, held_by_others=(path,) * player)
    stream = VideoStream(path, 16, {})
    for number in range(3):
        stream.write(frames(number))
    stream.finish({"report": "words"})
    assert bool(stream.warning) == player and path.stat().st_size > 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert not player or "close what has it open" in stream.warning


@pytest.mark.parametrize("name", ["C:a", "C:\\a", "..\\a", "sub\\a", "../a", "/a", "\\\\host\\share\\a"])
def test_a_shard_lies_beside_its_index_on_every_system(tmp_path, name):
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="expected a file beside it"):
        checkpoints.inspect(index)
