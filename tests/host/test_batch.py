"""The command batch with a real ComfyUI: a killed worker leaves a run that another one ends to the same bits."""

import json
import os
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.host.comfy_server import HOST
from tests.helpers.paths import ROOT

pytest.importorskip("ray", reason="no Ray: pip install 'flowcache[ray]'")

CHUNKS = 6


def workflow() -> dict:
    """Chunks after one another, so that a run that is gone on from has the same bits."""
    whole = json.loads((ROOT / "workflows" / "api" / "demo_extend.json").read_text())
    graph = {number: one for number, one in whole.items() if int(number) < 8}
    graph["7"]["inputs"] |= {"steps": 10, "lag": 10, "chunks": CHUNKS}
    return graph | {"8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "latent"}}}


def latent(out, number: int) -> torch.Tensor:
    (file,) = (out / f"{number:06}").glob("*.latent")
    return load_file(file)["latent_tensor"]


def test_four_jobs_by_two_workers_one_of_which_is_killed(tmp_path):
    from flowcache_core.batch.command import keep
    from flowcache_core.batch.dispatch import Tally, dispatch
    from flowcache_core.batch.host import HostSettings
    from flowcache_core.batch.jobs import Workflow, read_jobs
    from flowcache_core.batch.manifest import Manifest
    from flowcache_core.batch.on_ray import RayWorkers

    asked = [{"Caption.caption": "a red circle", "seed": seed} for seed in (1, 2, 3)]
    lines = [*map(json.dumps, asked), '{"sede": 4}', json.dumps(asked[0] | {"chunks": CHUNKS + 1})]
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    path.write_text("\n".join(lines))
    manifest, tally = Manifest(out, len(lines)), Tally(len(lines))
    settings = HostSettings(HOST, tmp_path / "runs", ("--cpu",))
    workers = RayWorkers(settings, 2, threads=1)
    killed: dict = {}

    def kill(_) -> None:
        """The worker of the first job, when some of its chunks are on disk."""
        begun = len(list((tmp_path / "runs").glob("*/chunk-*"))) >= 2
        if not killed and begun and (place := workers.where(0))["port"]:  # the chunks may be another worker's
            killed.update(place)
            os.kill(killed["pid"], signal.SIGKILL)

    jobs = read_jobs(path, Workflow(workflow()), manifest.done)
    try:
        dispatch(jobs, workers, manifest, tally, lambda *of: keep(out, *of), kill)
    finally:
        workers.close()
        manifest.close()
    assert killed and (tally.done, tally.failed, tally.again) == (4, 1, 1)
    entries = {entry["line"]: entry for entry in map(json.loads, manifest.path.read_text().splitlines())}
    assert "no node has an input 'sede'" in entries[4]["error"]
    assert sorted(entry["attempts"] for line, entry in entries.items() if line != 4) == [1, 1, 1, 2]
    (again,) = (line for line, entry in entries.items() if entry.get("attempts") == 2)
    assert again == 1  # it was worker 0's; that of line 5 is a chunk longer, begins alike, and was not disturbed
    assert latent(out, 1).shape[2] == 3 * CHUNKS
    assert torch.equal(latent(out, 1), latent(out, 5)[:, :, : 3 * CHUNKS])
    deadline = time.monotonic() + 10
    while answers(killed["port"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(killed["port"])


def answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0
