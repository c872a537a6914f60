"""All processes of a run end when one does, at once or where they agree to, and what was finished is gone on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core import __main__ as cli
from flowcache_core import checkpoints
from flowcache_core.checkpoints.weight_files import write_safetensors
from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.helpers.divided import free_port
from tests.helpers.paths import ROOT

SMALL = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64)
CHUNKS, BEFORE = 24, 4  # in all, and when one is ended
ENDED_WITHIN = 30  # seconds


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A run of a small network, but for its output and where it is kept."""
    torch.manual_seed(0)
    network = tmp_path_factory.mktemp("network") / "small.safetensors"
    info = checkpoints.CheckpointInfo("demo", SMALL, torch.float16, "wan", "", {}, 0)
    write_safetensors(WanNetwork(SMALL).state_dict(), checkpoints.stamp(info), network, torch.float16)
    run = ["generate", "a red circle", "--network", str(network), "--chunks", str(CHUNKS), "--budget", "2"]
    return [*run, "--steps", "8", "--lag", "8"]


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "a.latent"
    assert cli.main([*asked, "--out", str(out)]) == 0
    return load_file(out)["latent_tensor"]


def begin(asked: list[str], out: Path, runs: Path) -> list[subprocess.Popen]:
    """Two processes, stopped from outside when some chunks are on disk."""
    port, started = str(free_port()), []
    for rank in "01":
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "flowcache_core", *asked, "--out", str(out), "--resume", str(runs)]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | named, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    deadline = time.monotonic() + 120
    while len(list(runs.glob("*/chunk-*"))) < BEFORE:
        assert time.monotonic() < deadline and all(one.poll() is None for one in started)
        time.sleep(0.01)
    return started


@pytest.mark.parametrize(("ended", "how", "said"), [(1, signal.SIGKILL, "so all end"), (0, signal.SIGINT, "Cancelled")])
def test_a_run_whose_process_ends_is_gone_on_from(asked, undisturbed, tmp_path, capsys, ended, how, said):
    out, runs = tmp_path / "a.latent", tmp_path / "runs"
    started = begin(asked, out, runs)
    try:
        started[ended].send_signal(how)
        begun = time.monotonic()
        words = [one.communicate(timeout=ENDED_WITHIN)[1].decode() for one in started]
        assert time.monotonic() - begun < ENDED_WITHIN
    finally:
        for one in started:
            one.kill()
    left = [one.returncode for one in started]
    assert 0 not in left and said in words[1 - ended], (left, words)
    assert not out.exists()
    assert cli.main([*asked, "--out", str(out), "--resume", str(runs)]) == 0  # by one process
    assert " of 24 chunks were there from an interrupted run" in capsys.readouterr().out
    assert torch.equal(load_file(out)["latent_tensor"], undisturbed)
