"""What `python -m flowcache_core batch` does."""

import argparse
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..storage.files import write_whole
from .dispatch import Ended, Tally, dispatch
from .host import HostSettings
from .jobs import Job, Workflow, count_lines, read_jobs
from .manifest import Manifest

TOLD_EVERY = 5.0  # seconds between two lines of progress where they stay on the screen


def default_host() -> Path:
    """Where ComfyUI is looked for."""
    return Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))


def run_batch(options: argparse.Namespace) -> None:
    """Runs a file of jobs.

    Raises:
        UserError: nothing can be run, or some jobs have failed.
    """
    workflow, lines = Workflow.read(options.workflow), count_lines(options.jobs)
    if not lines:
        raise UserError(f'{options.jobs} has no jobs; give one JSON object a line, such as {{"seed": 1}}.')
    if options.workers is not None and options.workers < 1:
        raise UserError(f"workers is {options.workers}, expected at least 1.")
    from .on_ray import RayWorkers  # Ray, which nothing else needs

    runs = options.runs or options.out / "runs"
    settings = HostSettings(
        options.comfyui.resolve(), runs.resolve(), tuple(options.host_argument), options.models, options.heartbeat
    )
    manifest = Manifest(options.out, lines)
    tally = Tally(lines, manifest.done.count)
    if tally.done:
        print(f"{tally.done} of {lines} jobs are done already", flush=True)
    jobs = read_jobs(options.jobs, workflow, manifest.done)
    try:
        workers = RayWorkers(settings, options.workers, options.threads, options.ray)
        print(f"{workers.count} workers" + (f", http://{workers.dashboard}" if workers.dashboard else ""), flush=True)
        try:
            dispatch(jobs, workers, manifest, tally, partial(keep, options.out), Progress(runs).tell)
        finally:
            workers.close()
    finally:
        manifest.close()
    print(f"{tally.text()}; {options.out}: {manifest.path.name}", flush=True)
    if tally.failed:
        raise UserError(f"{tally.failed} jobs have failed: {manifest.path} says why; run it again for those alone.")


def keep(out: Path, job: Job, ended: Ended) -> dict:
    """Writes a job's results to a folder of its own; gives their names for the manifest."""
    folder = out / f"{job.number:06}"
    names = []
    for name, content in ended.files:
        path = folder / Path(name).name
        write_whole(path, partial(Path.write_bytes, data=content))
        names.append(str(path.relative_to(out)))
    if ended.reports:
        path = folder / "report.txt"
        write_whole(path, partial(Path.write_text, data="\n\n".join(ended.reports) + "\n", encoding="utf-8"))
        names.append(str(path.relative_to(out)))
    return {"files": names, "worker": str(ended.worker)}


class Progress:
    """One line on the terminal: jobs, chunks, time left.

    Args:
        runs: the folder where workers keep finished chunks.
    """

    def __init__(self, runs: Path):
        self.runs, self.told, self.last = runs, 0.0, ""
        self.begun = time.time()

    def tell(self, tally: Tally) -> None:
        """Shows how far it is."""
        live = sys.stderr.isatty()
        if time.monotonic() - self.told < (1.0 if live else TOLD_EVERY):
            return
        self.told = time.monotonic()
        words = f"{tally.text()}, {self.chunks()} chunks of runs that go on"
        if words != self.last:
            print("\r\x1b[K" + words if live else words, end="" if live else "\n", file=sys.stderr, flush=True)
        self.last = words

    def chunks(self) -> int:
        """Chunks on disk of runs that were written to in the last minute."""
        count = 0
        with suppress(OSError), os.scandir(self.runs) as found:
            for folder in found:
                with suppress(OSError):
                    if time.time() - folder.stat().st_mtime < 60:
                        count += sum(name.startswith("chunk-") for name in os.listdir(folder.path))
        return count
