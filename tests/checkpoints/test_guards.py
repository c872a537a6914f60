"""Files that would make the reader wait, run on, or take more memory than they hold."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowcache_core.checkpoints import guards, magi_files
from flowcache_core.checkpoints.sizes import own_tensors
from flowcache_core.checkpoints.weight_files import folder_settings, open_weights
from flowcache_core.errors import UserError
from flowcache_core.models.magi.text import SpecialTokens
from flowcache_core.models.wan import WanNetwork
from flowcache_core.reuse.calibration import Calibration, Measured, parse_calibration, write_calibration
from flowcache_core.storage import files
from flowcache_core.storage.calibrations import load_calibration
from flowcache_core.storage.state import FORMAT, load_state
from tests.helpers.tiny import TINY


def test_blocks_that_only_have_names_are_not_made():
    with torch.device("meta"):
        tensors = WanNetwork(replace(TINY, num_layers=1)).state_dict()
    tensors |= {f"blocks.{number}.norm3.weight": torch.zeros(0) for number in range(1, 30_000)}
    begun = time.process_time()
    with pytest.raises(UserError, match="tensors for 30000 blocks, expected at least"):
        own_tensors(Path("a.safetensors"), tensors, replace(TINY, num_layers=30_000))
    assert time.process_time() - begun < 5


def test_a_tensor_with_more_numbers_than_its_file(tmp_path):
    torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(1).expand(10**6)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a.pt has b of shape \[1000000\], and 4 bytes for it"):
        open_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("limit", ["MOST_OPCODES", "LARGEST_PICKLE", "MOST_TENSORS"])
def test_a_pickle_longer_than_plain_tensors_need_is_not_read(tmp_path, monkeypatch, limit):
    torch.save({"a": torch.zeros(2, 3)}, tmp_path / "a.pt")
    assert set(open_weights(tmp_path / "a.pt").tensors) == {"a"}
    monkeypatch.setattr(guards, limit, 2)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(UserError, match="no torch file of plain tensors"):
        open_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "model.index.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="no regular file"):
        open_weights(tmp_path / name)


def test_json_larger_than_any_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"dim": 1024}')
    with pytest.raises(UserError, match="13 bytes, expected at most 10"):
        folder_settings(tmp_path)
    with pytest.raises(UserError, match="13 bytes, expected at most 10"):
        load_calibration(tmp_path / "config.json")


def named(path: Path, count: int, metadata: dict[str, str]) -> Path:
    """A safetensors file of so many tensors without a number."""
    header = {f"x{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}
    told = json.dumps({"__metadata__": metadata, **header}).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told)
    return path


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (open_weights, "names 71 tensors, expected at most 50"),
        (magi_files.read_vae, "names 71 tensors, expected at most 50"),
        (load_state, "a header of 4,.* bytes, expected at most 1,000"),
    ],
)
def test_a_file_of_more_tensors_than_any_model_has(tmp_path, monkeypatch, read, words):
    """A million took 20 to 45 s, in which the server answered nobody."""
    monkeypatch.setattr(guards, "MOST_TENSORS", 50)
    monkeypatch.setattr(files, "LARGEST_HEADER", 1000)
    monkeypatch.setattr(torch, "empty", lambda *args, **more: pytest.fail("a tensor was made"))
    with pytest.raises(UserError, match=words):
        read(named(tmp_path / "a.safetensors", 70, {"format": FORMAT}))


@pytest.mark.parametrize("arrays", [{f"a{number}": (1,) for number in range(100)}, {"caption_token": (2**24, 2)}])
def test_an_npz_that_holds_more_than_special_tokens_is_not_read(tmp_path, monkeypatch, arrays):
    np.savez_compressed(tmp_path / "a.npz", **{name: np.zeros(shape, np.int8) for name, shape in arrays.items()})
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(UserError, match="is not MAGI-1's special_tokens.npz .* bytes"):
        SpecialTokens.from_file(tmp_path / "a.npz")


@pytest.mark.parametrize(("name", "value"), [("depth", 30_000), ("embed_dim", 2**40), ("video_size", 10**400)])
def test_sizes_of_a_magi_vae_are_bounded_before_it_is_built(tmp_path, monkeypatch, name, value):
    settings = {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": {name: value}}
    named(tmp_path / "a.safetensors", 1, {magi_files.STAMP: json.dumps(settings)})
    monkeypatch.setattr(magi_files, "load_vae", lambda *args: pytest.fail("it was built"))
    with pytest.raises(UserError, match=f"has {name} = .*, expected 1 to") as caught:
        magi_files.read_vae(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("found", "put"),
    [
        *[("8", str(10**400)), ("27.0", str(10**400)), ("8", "9" * 5000), ("8", "true"), ("8", "-1"), ("2", "1.5")],
        ("8", "[" * 100_000),
    ],
    ids=range(7),
)
def test_absurd_numbers_in_a_calibration(found, put):
    good = write_calibration(Calibration(8, 2, 4, 3, (Measured((0, 3, 6), 27.0),)))
    assert parse_calibration(good).steps == 8
    with pytest.raises(ValueError):
        parse_calibration(good.replace(f" {found}", f" {put}", 1))
