"""A worker's server, pretended: it is fed, found when it hangs, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowcache_core.batch.host import Failed, Hangs, Host, HostSettings
from flowcache_core.errors import UserError
from tests.helpers.paths import ROOT

PRETENDED = ROOT / "tests" / "helpers" / "pretended_host"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


def asking(**inputs) -> dict:
    return {"1": {"class_type": "Anything", "inputs": inputs}}


def server_of(host: Host) -> int:
    keeper = host.keeper.pid
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ends(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_results_failures_and_a_server_that_hangs(tmp_path):
    host = Host(HostSettings(PRETENDED, tmp_path / "runs", heartbeat=3))
    try:
        outputs = host.run(asking(says="done"))
        assert host.files(outputs) == [("a.txt", b"done")] and not list((host.base / "output").iterdir())
        with pytest.raises(Failed, match="Sampler: too hot$"):
            host.run(asking(fails=True))
        with pytest.raises(Failed, match="Sampler: Value too small"):
            host.run(asking(refused=True))
        server = server_of(host)
        os.kill(server, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(Hangs, match="no answer for 3 s|timed out"):
            host.run(asking(endless=True))
        assert time.monotonic() - begun < 20
    finally:
        host.close()
    assert ends(server) and not host.base.exists()


@pytest.mark.parametrize("killed", ["worker", "keeper"])
def test_no_server_is_left_behind(tmp_path, killed):
    script = (
        "import sys, time; from pathlib import Path; from flowcache_core.batch.host import *\n"
        "host = Host(HostSettings(Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "print(host.keeper.pid, flush=True); time.sleep(600)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(PRETENDED), str(tmp_path / "runs")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        keeper = int(worker.stdout.readline())
        server = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        assert alive(server)
        os.kill(worker.pid if killed == "worker" else keeper, signal.SIGKILL)
        assert ends(server) and ends(keeper)
    finally:
        worker.kill()
        worker.wait()


def test_a_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no ComfyUI at"):
        Host(HostSettings(tmp_path, tmp_path / "runs"))


def test_an_engine_without_the_nodes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("flowcache_core.batch.host.PACK", tmp_path)  # as pip installs it
    with pytest.raises(UserError, match="put the pack there, or run the command in the pack's folder"):
        Host(HostSettings(PRETENDED, tmp_path / "runs"))
