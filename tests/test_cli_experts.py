"""Two networks from the command line: as two files or a pipeline's folder, behind a picture, gone on from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core import checkpoints
from flowcache_core.__main__ import main
from flowcache_core.checkpoints.weight_files import write_safetensors
from flowcache_core.command_generate import read_latent, write_latent
from flowcache_core.errors import UserError
from flowcache_core.models.experts import ExpertsBackbone
from flowcache_core.models.wan import WanNetwork
from tests.helpers.magi_weights import normal
from tests.test_cli import SMALL

FIXED = "--family experts --width 64 --height 64 --preset off --dtype float32".split()


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Networks of the high-noise and the low-noise expert."""
    paths = [tmp_path / "high.safetensors", tmp_path / "low.safetensors"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        info = checkpoints.CheckpointInfo("experts", SMALL, torch.float16, "wan", "", {}, 0)
        write_safetensors(WanNetwork(SMALL).state_dict(), checkpoints.stamp(info), path, torch.float16)
    save_file({"embedding": normal("text.cond", (1, 8, SMALL.text_dim))}, tmp_path / "text.st")
    write_latent(tmp_path / "image.latent", normal("image", (1, 16, 1, 8, 8)), magi=False)
    return paths


def generate(files: list[Path], out: str, chunks: int, *more: str, both: bool = True) -> torch.Tensor:
    folder = files[0].parent
    words = ["generate", "--network", str(files[0]), "--chunks", str(chunks), "--out", str(folder / out), *FIXED]
    words += ["--text", str(folder / "text.st"), *(["--network-low", str(files[1])] if both else []), *more]
    assert main(words) == 0
    return read_latent(folder / out, False, 16)


def test_begins_with_a_picture_and_goes_on_from_a_state(files, capsys):
    folder = files[0].parent
    image, state = str(folder / "image.latent"), str(folder / "state.safetensors")
    whole = generate(files, "whole.latent", 4, "--prefix", image)
    assert "forwards: 42 of 40" in capsys.readouterr().out  # the picture's own come on top
    assert whole.shape[2] == 13 and torch.allclose(whole[:, :, :1], read_latent(Path(image), False, 16), atol=1e-6)
    generate(files, "begun.latent", 1, "--prefix", image, "--save-state", state)
    assert torch.equal(generate(files, "after.latent", 3, "--state", state), whole)
    other = generate(files[::-1], "other.latent", 4, "--prefix", image)
    assert not torch.allclose(other, whole, atol=1e-2)


def test_an_interrupted_run_goes_on_with_the_same_bits(files, capsys):
    folder = files[0].parent
    more = ["--prefix", str(folder / "image.latent"), "--resume", str(folder / "runs")]
    whole = generate(files, "whole.latent", 4, *more)
    (run,) = (folder / "runs").iterdir()
    newest = sorted(run.glob("added-*"))
    assert len(newest) == 3
    for file in newest[1:]:
        file.unlink()
    assert torch.equal(generate(files, "again.latent", 4, *more), whole)
    assert "2 of 4 chunks were there from an interrupted run" in capsys.readouterr().out


def pipeline(files: list[Path], boundary: float) -> Path:
    """The folder of a pipeline with both, as upstream publishes it."""
    folder = files[0].parent / "pipeline"
    for name, file in zip(("transformer", "transformer_2"), files, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        file.rename(folder / name / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    return folder


def test_a_pipelines_folder_has_both_and_says_where_they_change(files):
    image = str(files[0].parent / "image.latent")
    two = generate(files, "two.latent", 2, "--prefix", image)
    folder = pipeline(files, 0.9)
    loaded = checkpoints.load_experts(folder)
    assert isinstance(loaded.backbone, ExpertsBackbone) and loaded.backbone.boundary == loaded.usual.boundary == 0.9
    assert not loaded.info.warnings and loaded.info.bytes == sum(
        file.stat().st_size for file in folder.glob("*/model.safetensors")
    )
    said = [files[0].parent / "pipeline", files[1]]
    one = generate(said, "one.latent", 2, "--prefix", image, both=False)
    assert not torch.equal(one, two)
    pipeline_says = folder / "model_index.json"
    pipeline_says.write_text(json.dumps({"boundary_ratio": 0.875}))
    assert torch.equal(generate(said, "same.latent", 2, "--prefix", image, both=False), two)


def test_info_counts_the_memory_of_both(files, tmp_path, capsys):
    plain = tmp_path / "plain.safetensors"
    info = checkpoints.CheckpointInfo("causal", SMALL, torch.float16, "wan", "", {}, 0)
    write_safetensors(load_file(files[0]), checkpoints.stamp(info), plain, torch.float16)
    said = []
    for path in (files[0], plain):
        assert main(["info", str(path), "--width", "128", "--height", "64", "--seconds", "5"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("history")]
        said.append(float(line.split()[1]))
    assert said[0] == pytest.approx(2 * said[1], abs=0.1)


def test_what_does_not_fit_is_told(files, tmp_path, capsys):
    text, out = str(tmp_path / "text.st"), str(tmp_path / "a.latent")
    words = ["generate", "--network", str(files[0]), "--text", text, "--out", out]
    assert main([*words, *FIXED]) == 2
    assert "high.safetensors is one of two networks" in capsys.readouterr().err
    assert main([*words, "--family", "causal", "--network-low", str(files[1])]) == 2
    assert "--network-low is of the family experts alone" in capsys.readouterr().err
    assert main([*words, *FIXED, "--prefix", "a", "--state", "b"]) == 2
    assert "Both --prefix and --state are given" in capsys.readouterr().err
    half = tmp_path / "half.safetensors"
    smaller = replace(SMALL, num_layers=1)
    info = checkpoints.CheckpointInfo("experts", smaller, torch.float16, "wan", "", {}, 0)
    write_safetensors(WanNetwork(smaller).state_dict(), checkpoints.stamp(info), half, torch.float16)
    with pytest.raises(UserError, match="networks of other sizes"):
        checkpoints.load_experts(files[0], half)
    folder = pipeline(files, 0.9)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(UserError, match="Cannot read .*model_index.json"):
        checkpoints.load_experts(folder)
