"""States from files that nobody vouches for: one line says what is wrong, whatever it is."""

import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.errors import UserError
from flowcache_core.history.snapshot import Snapshot
from flowcache_core.storage.state import FORMAT, State, load_state, make_state, save_state

INFO = {"branches": ["0.0"], "chunk_frames": 2, "model": "tiny", "dropped": 0}


def state() -> State:
    keys = torch.randn(2, 1, 2, 8, 4)
    tokens = torch.arange(8, dtype=torch.int32).expand(2, 1, 2, -1)
    return make_state(torch.randn(1, 4, 4, 6, 4), {"0.0": Snapshot(keys, -keys, tokens, keys[:, :, :, :3])}, 2, "tiny")


def tensors() -> dict[str, torch.Tensor]:
    made = state()
    history = {f"history.0.{name}": part.contiguous() for name, part in made.histories[0]._asdict().items()}
    return {"latents": made.latents, **history}


def refused(path, told: str | None = None, **changed) -> str:
    """What is said of a file whose tensors differ from a good one's."""
    names = {name.replace("_", "."): value for name, value in changed.items()}
    save_file(tensors() | names, path, metadata={"format": FORMAT, "state": told or json.dumps(INFO)})
    with pytest.raises(UserError) as caught:
        load_state(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300 and message.endswith(".")
    return message


def test_a_state_is_read_as_it_was_written(tmp_path):
    made = state()._replace(prompts="0: a circle\n1-: a cube")
    save_state(made, tmp_path / "a.safetensors")
    again = load_state(tmp_path / "a.safetensors")
    assert torch.equal(again.latents, made.latents) and again[2:] == made[2:]
    assert all(torch.equal(ours, its) for ours, its in zip(again.histories[0], made.histories[0], strict=True))


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("latents", torch.zeros(1, 4, 4, 6, 4, dtype=torch.float8_e4m3fn), "latents of type torch.float8_e4m3fn"),
        ("latents", torch.full((1, 4, 4, 6, 4), float("inf")), "latents that are not finite"),
        ("latents", torch.zeros(1, 4, 0, 6, 4), "latents of shape"),
        ("latents", torch.zeros(2, 4, 4, 6, 4), "keys (2, 1, 2, 8, 4)"),
        ("history_0_keys", torch.full((2, 1, 2, 8, 4), float("nan")), "keys that are not finite"),
        ("history_0_values", torch.zeros(2, 1, 2, 8, 4, dtype=torch.int8), "values of type torch.int8"),
        ("history_0_values", torch.zeros(2, 1, 2, 7, 4), "values (2, 1, 2, 7, 4)"),
        ("history_0_queries", torch.zeros(3, 1, 2, 3, 4), "queries (3, 1, 2, 3, 4)"),
        ("history_0_queries", torch.zeros(2, 1, 2, 3, 5), "queries (2, 1, 2, 3, 5)"),
        ("history_0_tokens", torch.full((2, 1, 2, 8), 2**31 - 1, dtype=torch.int32), "numbers that are not below 96"),
        ("history_0_tokens", torch.arange(-1, 7, dtype=torch.int32).expand(2, 1, 2, -1).clone(), "token numbers"),
        ("history_0_tokens", torch.ones(2, 1, 2, 8, dtype=torch.int32), "token numbers out of order"),
        ("history_0_tokens", torch.zeros(2, 1, 2, 8), "token numbers (2, 1, 2, 8) of type torch.float32"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path, part, value, words):
    assert words in refused(tmp_path / "a.safetensors", **{part: value})


@pytest.mark.parametrize(
    "told",
    [
        "[" * 100_000,
        "no json",
        "[]",
        json.dumps(INFO | {"chunk_frames": 10**400})[:1000],
        json.dumps(INFO | {"chunk_frames": 0}),
        json.dumps(INFO | {"dropped": 10**18}),
        json.dumps(INFO | {"branches": ["0.0"] * 30_000}),
        json.dumps(INFO | {"branches": [7]}),
        json.dumps(INFO | {"model": None}),
        json.dumps(INFO | {"prompts": 7}),
        json.dumps(INFO | {"prompts": "0-: " + "a" * 2**20}),
        json.dumps(INFO | {"chunk_frames": "9" * 5000}),
        '{"branches": ["0.0"], "model": "", "chunk_frames": ' + "9" * 5000 + "}",
    ],
)
def test_words_that_make_no_state(tmp_path, told):
    assert "damaged state" in refused(tmp_path / "a.safetensors", told)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    """safetensors has an error of its own for it, which is no OSError."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, most[1]))
    try:
        with pytest.raises(UserError, match="Cannot write .* free some space") as caught:
            save_state(state(), tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no regular file"):
        load_state(tmp_path / "a.safetensors")
