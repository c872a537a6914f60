"""Files that would make the reader wait, run on, or take more memory than they hold."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowcache_core.checkpoints import guards
from flowcache_core.checkpoints.sizes import own_tensors
from flowcache_core.checkpoints.weight_files import folder_settings, open_weights
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanNetwork
from flowcache_core.reuse.calibration import Calibration, Measured, parse_calibration, write_calibration
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


@pytest.mark.parametrize("limit", ["MOST_OPCODES", "LARGEST_PICKLE", "MOST_ENTRIES"])
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
    monkeypatch.setattr(guards, "LARGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"dim": 1024}')
    with pytest.raises(UserError, match="13 bytes, expected at most 10"):
        folder_settings(tmp_path)


@pytest.mark.parametrize(
    ("found", "put"),
    [("8", str(10**400)), ("27.0", str(10**400)), ("8", "9" * 5000), ("8", "true"), ("8", "-1"), ("2", "1.5")],
)
def test_absurd_numbers_in_a_calibration(found, put):
    good = write_calibration(Calibration(8, 2, 4, 3, (Measured((0, 3, 6), 27.0),)))
    assert parse_calibration(good).steps == 8
    with pytest.raises(ValueError):
        parse_calibration(good.replace(f" {found}", f" {put}", 1))
