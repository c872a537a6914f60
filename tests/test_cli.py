"""The command line, on a small random network of the demo's family."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flowcache_core import __main__ as cli
from flowcache_core import checkpoints, command_generate
from flowcache_core.checkpoints.weight_files import write_safetensors
from flowcache_core.demo import compare as comparison
from flowcache_core.engine.loop import Progress
from flowcache_core.media.progress_bar import Bar
from flowcache_core.media.video import save_video
from flowcache_core.models.wan import WanConfig, WanNetwork
from flowcache_core.reuse.calibration import Calibration, Measured
from flowcache_core.storage.calibrations import calibration_path, save_calibration
from tests.helpers.paths import ROOT

SMALL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64)
FAST = ["--chunks", "2", "--steps", "4", "--enlarge", "1"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    return stamped(tmp_path_factory.mktemp("network") / "small.safetensors", "demo")


def stamped(path: Path, family: str) -> Path:
    config = replace(SMALL, in_dim=48, out_dim=48) if family == "longlive 2" else SMALL
    info = checkpoints.CheckpointInfo(family, config, torch.float16, "wan", "", {}, 0)
    write_safetensors(WanNetwork(config).state_dict(), checkpoints.stamp(info), path, torch.float16)
    return path


def test_generate_writes_video_report_and_state(network, tmp_path, capsys):
    common = ["--network", str(network), *FAST]
    out, state = tmp_path / "new" / "a.webp", tmp_path / "s.safetensors"
    first = ["generate", "a red circle", "--out", str(out), "--save-state", str(state), *common]
    assert cli.main([*first, "--report", str(tmp_path / "r.png")]) == 0
    said = capsys.readouterr()
    assert "21 frames" in said.out and "2 chunks of 4 steps, lag 1" in said.out and "100%, chunk 2 of 2" in said.err
    with Image.open(out) as video, Image.open(tmp_path / "r.png") as picture:
        assert (video.n_frames, video.size, picture.width) == (21, (64, 64), 800)
    longer, report = tmp_path / "b.webp", tmp_path / "r.json"
    second = ["generate", "a red circle", "a blue square", "--out", str(longer), "--state", str(state), *common]
    assert cli.main([*second, "--report", str(report)]) == 0
    assert "chunk 4 of 4" in capsys.readouterr().err
    with Image.open(longer) as video:
        assert video.n_frames == 45
    assert json.loads(report.read_text())["chunks"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.webp", "new", "r.json", "r.png", "s.safetensors"]


def quick_decode(latents: torch.Tensor, chunk_frames: int) -> torch.Tensor:
    """The right number of 16 x 16 frames, from three of the channels."""
    frames = latents[0, :3].repeat_interleave(4, dim=1)[:, 3:]
    return frames.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).clamp(-1, 1)


def test_quality_goes_by_the_networks_own_calibration(network, tmp_path, capsys):
    made = Calibration(4, 1, 2, 1, (Measured((0, 2), 40.0),))
    save_calibration(made, calibration_path(network))
    arguments = ["generate", "a red circle", "--out", str(tmp_path / "a.webp"), "--network", str(network), *FAST]
    assert cli.main([*arguments, "--quality", "balanced"]) == 0
    assert "forwards: 6 of 10" in capsys.readouterr().out  # two steps and a clean pass, of two chunks
    assert cli.main([*arguments, "--quality", "1"]) == 0
    assert "forwards: 10 of 10" in capsys.readouterr().out
    assert cli.main([*arguments, "--quality", "best"]) == 2
    assert "There is no quality 'best'" in capsys.readouterr().err


def test_demo_writes_what_it_promises(network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "STEPS", 8)
    monkeypatch.setattr(comparison, "decode", quick_decode)
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--chunks", "12", "--network", str(network)]) == 0
    names = ["flowcache.mp4", "plain.mp4", "report.json", "report.png", "short_history.mp4", "side_by_side.webp"]
    assert sorted(path.name for path in out.iterdir()) == names
    numbers = json.loads((out / "report.json").read_text())
    promised = (
        "seconds_plain seconds_flowcache speedup psnr ssim forwards_total forwards_executed overhead chunks "
        "psnr_budget detector_plain detector_budget history_bytes_peak history_bytes_unbounded"
    )
    assert set(promised.split()) <= set(numbers)
    assert numbers["chunks"] == 12 and numbers["forwards_total"] == 12 * 9
    assert numbers["history_bytes_peak"] <= 0.45 * numbers["history_bytes_unbounded"]
    assert numbers["speedup"] == pytest.approx(numbers["seconds_plain"] / numbers["seconds_flowcache"], rel=0.05)
    with Image.open(out / "side_by_side.webp") as together, Image.open(out / "report.png") as picture:
        assert together.n_frames == 1 + 4 * (12 * 3 - 1) and picture.width == 800
    assert "PSNR to plain" in capsys.readouterr().out


def test_info_and_convert(network, tmp_path, capsys):
    assert cli.main(["info", str(network)]) == 0
    assert "family    demo" in capsys.readouterr().out
    plain, out = stamped(tmp_path / "plain.safetensors", "wan"), tmp_path / "converted.safetensors"
    assert cli.main(["convert", str(plain), str(out), "--family", "causal", "--dtype", "bfloat16"]) == 0
    info = checkpoints.inspect(out)
    assert (info.family, info.dtype) == ("causal", torch.bfloat16)


def test_info_tells_the_memory_of_a_video(network, capsys):
    assert cli.main(["info", str(network), "--width", "128", "--height", "64", "--seconds", "9"]) == 0
    whole = capsys.readouterr().out
    assert "128x64, 153 frames (9.6 s), 13 chunks" in whole and "all of it kept" in whole
    assert cli.main(["info", str(network), "--seconds", "9", "--budget", "2", "--relative", "--preset", "fast"]) == 0
    assert "2 finished chunks kept" in capsys.readouterr().out
    assert cli.main(["info", str(network), "--seconds", "9", "--window", "6", "--sink", "1"]) == 0
    assert "3 finished frames kept" in capsys.readouterr().out
    assert cli.main(["info", str(network), "--seconds", "0.4", "--lag", "64"]) == 0
    assert "9 frames (0.6 s), 1 chunks" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["skyreels", "causal", "causvid", "rolling", "longlive", "longlive 2", "krea"])
def test_info_tells_the_settings_that_the_docs_do(family, tmp_path, capsys):
    table = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("## Settings")[2]
    line = next(
        line for line in table.splitlines() if line.startswith((f"| {family} |", f"| {family}, ", f"| {family} ("))
    )
    _, steps, lag, frames, shift, guidance, _, size, *_ = (cell.strip() for cell in line.strip("|").split("|"))
    assert cli.main(["info", str(stamped(tmp_path / "file.safetensors", family))]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("settings")]
    steps, lag = steps.split()[0], steps.split()[0] if lag == "all" else lag
    expected = f"{steps} steps, lag {lag}, {frames} latent frames a chunk, shift {shift}, guidance {guidance}, "
    assert expected in said and said.endswith(f"; {size}")


def test_info_of_rolling_forcing_tells_what_its_history_grows_to(tmp_path, capsys):
    out = stamped(tmp_path / "rolling.safetensors", "rolling")
    assert cli.main(["info", str(out), "--width", "64", "--height", "64", "--seconds", "30"]) == 0
    # Keys and values of 7 chunks of 48 tokens in 2 layers, 48 wide, in bfloat16.
    assert f"history   {7 * 48 * 2 * 2 * 48 * 2 / 2**20:.1f} MB in bfloat16, whatever" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", ["generator", "generator_ema"])
def test_convert_takes_the_weights_that_are_asked_for(tmp_path, chosen):
    one_head = WanNetwork(replace(SMALL, dim=128, num_heads=1)).state_dict()  # 128 wide, as without metadata
    shifts = {"generator": 1.0, "generator_ema": 2.0}
    both = {
        kind: {f"model.{key}": weight + shift for key, weight in one_head.items()} for kind, shift in shifts.items()
    }
    torch.save(both, tmp_path / "both.pt")
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "both.pt"), str(out), "--family", "causal", "--weights", chosen]) == 0
    written = checkpoints.load(out)[1]
    assert all(torch.equal(written[name], weight + shifts[chosen]) for name, weight in one_head.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a purple cow"], "does not know the word 'purple'"),
        (["generate", "a red circle", "--chunks", "0"], "chunks is 0"),
        (["generate", "a red circle", "--steps", "0"], "steps is 0"),
        (["generate", "a red circle", "--lag", "99"], "lag is 99"),
        (["generate", "a red circle", "--budget", "0"], "budget is 0"),
        (["generate", "a red circle", "--relative"], "need a history budget"),
        (["generate", "a red circle", "--window", "9", "--budget", "2"], "leave one away"),
        (["generate", "a red circle", "--window", "3"], "leaves 0 frames"),
        (["generate", "a red circle", "--sink", "3"], "needs a window"),
        (["generate", "a red circle", "--seed", "-1"], "seed is -1"),
        (["generate", "a red circle", "--state", "nowhere.safetensors"], "Cannot read a state"),
        (["generate", "a red circle", "--network", "nowhere.safetensors"], "does not exist"),
        (["demo", "--chunks", "4"], "too few"),
        (["demo", "--caption", "circle"], "is no shape"),
        (["info", "nowhere.safetensors"], "does not exist"),
        (["info", "NETWORK", "--seconds", "0"], "seconds is 0"),
        (["info", "NETWORK", "--lag", "99"], "lag is 99"),
        (["info", "NETWORK", "--relative"], "need a history budget"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(network, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [str(network) if word == "NETWORK" else word for word in arguments]
    if "--network" not in arguments and arguments[0] != "info":
        arguments = [*arguments, "--network", str(network)]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and words in said[-1] and len(said) == 1
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_told_before_any_work(network, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (
        ["generate", "a red circle", "--out", str(tmp_path / "file" / "a.mp4")],
        ["demo", "--out", str(tmp_path / "file")],
    ):
        assert cli.main([*command, "--network", str(network)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "Cannot write" in said[0]


def test_interrupt_leaves_nothing(network, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_generate, "generate", interrupted)
    assert cli.main(["generate", "a red circle", "--out", str(tmp_path / "a.mp4"), "--network", str(network)]) == 130
    assert list(tmp_path.iterdir()) == [] and "Cancelled" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_redraws_one_line_on_a_terminal():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = Bar("making", 3, stream)
        for tick in range(1, 101):
            bar(Progress(tick, 100, [], tick // 34))
    assert re.search(r"] making 100%, chunk 2 of 3, \d\.\d s\n$", terminal.getvalue())
    assert terminal.getvalue().count("\n") == 1
    assert len(pipe.getvalue().splitlines()) == 11


def test_two_video_files_are_compared(tmp_path, capsys):
    frames = np.random.default_rng(0).integers(60, 190, (3, 4, 6, 3), dtype=np.uint8)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2)
    first, second = (save_video(one, tmp_path / f"{one[0, 0, 0, 0]}.mp4") for one in (frames, 250 - frames))
    assert cli.main(["compare", str(first), str(first)]) == 0
    assert "The 3 frames are equal." in capsys.readouterr().out
    assert cli.main(["compare", str(first), str(second)]) == 0
    assert float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0]) < 20
    assert cli.main(["compare", str(first), str(tmp_path / "gone.mp4")]) == 2
    assert "gone.mp4 cannot be read as a video" in capsys.readouterr().err


def test_generate_from_a_video(network, tmp_path, capsys):
    """Of what --out wrote; a strength just above 0 gives it back, and the run has its own name for --resume."""
    common = ["--network", str(network), *FAST, "--guidance", "1"]
    source, redone = tmp_path / "a.latent", tmp_path / "b.latent"
    assert cli.main(["generate", "a red circle", "--out", str(source), *common]) == 0

    def made(*more: str, out: Path = redone) -> torch.Tensor:
        told = ["generate", "a blue square", "--out", str(out), "--video", str(source), "--seed", "4", *common]
        assert cli.main([*told, *more]) == 0
        return load_file(out)["latent_tensor"]

    video = load_file(source)["latent_tensor"]
    assert (made("--strength", "0.0001") - video).norm() < 0.02 * video.norm()
    assert (made() - video).norm() > 0.1 * video.norm()
    assert "2 chunks of 3 steps, lag 1" in capsys.readouterr().out
    runs = ["--resume", str(tmp_path / "runs")]
    half, more = made("--strength", "0.5", *runs), made("--strength", "0.75", *runs)
    assert not torch.equal(half, more) and torch.equal(made("--strength", "0.75"), more)
    assert "from an interrupted run" not in capsys.readouterr().out
    assert torch.equal(made("--strength", "0.5", *runs), half)
    assert "2 of 2 chunks were there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--strength", "0"], "strength is 0, expected above 0 to 1"),
        (["--chunks", "3"], "6 latent frames, and 3 chunks of 3 take 9: it is enough for 2 chunks"),
        (["--video", "none.latent"], "Cannot read none.latent"),
    ],
)
def test_a_video_that_does_not_fit(network, tmp_path, capsys, more, words):
    source = tmp_path / "a.latent"
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": torch.randn(1, 16, 6, 8, 8), **version}, source)
    told = ["generate", "a red circle", "--network", str(network), *FAST, "--out", str(tmp_path / "b.latent")]
    assert cli.main([*told, "--video", str(source), *more]) == 2
    assert words in capsys.readouterr().err
