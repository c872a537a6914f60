"""A thousand workers that only sleep, and a hundred thousand jobs: whether manifest, memory and dispatch hold.

`python -m flowcache_core.batch.simulate`: the workers are coroutines in a few asynchronous actors of Ray; jobs,
manifest and dispatch are those of the command batch.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from .dispatch import Ended, Tally, dispatch
from .jobs import Job, Workflow, read_jobs
from .manifest import Manifest

GRAPH = {
    "1": {"class_type": "LoadModel", "inputs": {"name": "a"}},
    "2": {"class_type": "Sleep", "inputs": {"seconds": 0.0, "model": ["1", 0]}},
}


class Sleepers:
    """Workers in asynchronous actors: (actor, number in it)."""

    def __init__(self, count: int, actors: int, loss: float):
        import ray

        from .on_ray import those_ended

        class Sleeper:
            async def run(self, seconds: float, lost: bool) -> bool:
                await asyncio.sleep(seconds)
                return lost

        self.ray, self.those_ended = ray, those_ended
        ray.init("local", num_cpus=max(actors, os.cpu_count() or 1), log_to_driver=False, include_dashboard=False)
        remote = ray.remote(Sleeper).options(num_cpus=0.1, max_concurrency=count // actors + 1)
        self.actors: list[Any] = [remote.remote() for _ in range(actors)]
        self.workers = list(range(count))
        self.loss, self.random = loss, random.Random(0)
        self.running: dict = {}

    def names(self) -> Sequence[Hashable]:
        return self.workers

    def begin(self, worker: Hashable, job: Job) -> None:
        assert isinstance(worker, int)
        actor = self.actors[worker % len(self.actors)]
        seconds = job.graph["2"]["inputs"]["seconds"]
        self.running[actor.run.remote(seconds, self.random.random() < self.loss)] = worker

    def ended(self, seconds: float) -> list[Ended]:
        ready = self.those_ended(list(self.running), seconds)
        lost = self.ray.get(ready)
        return [
            Ended(self.running.pop(reference), lost=gone, error="lost" if gone else "")
            for reference, gone in zip(ready, lost, strict=True)
        ]

    def replace(self, worker: Hashable) -> None:
        """They come back by themselves."""


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowcache_core.batch.simulate", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--actors", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a job sleeps, on the mean")
    parser.add_argument("--loss", type=float, default=0.001, help="share of jobs whose worker is lost")
    options = parser.parse_args(arguments)
    numbers = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.jsonl"
        with path.open("w") as file:
            for number in range(options.jobs):
                seconds = round(numbers.uniform(0.5, 1.5) * options.seconds, 3)
                file.write(json.dumps({"seconds": seconds, "name": "ab"[number % 2]}) + "\n")
        manifest = Manifest(Path(folder) / "out", options.jobs)
        tally = Tally(options.jobs)
        workers = Sleepers(options.workers, options.actors, options.loss)
        tenth, memory = max(1, options.jobs // 10), {}
        begun = time.monotonic()

        def tell(told: Tally) -> None:
            part = told.done // tenth
            if part not in memory:
                memory[part] = resident()
                size = manifest.path.stat().st_size
                print(
                    f"{told.done:>7} jobs, {time.monotonic() - begun:6.0f} s, {memory[part] / 2**20:5.0f} MiB, "
                    f"{1000 * told.dispatch / max(1, told.done):.2f} ms a job in dispatch, "
                    f"{size / max(1, told.done):.0f} bytes of manifest a job",
                    flush=True,
                )

        dispatch(
            read_jobs(path, Workflow(GRAPH), manifest.done),
            workers,
            manifest,
            tally,
            lambda job, ended: {"files": []},
            tell,
        )
        workers.ray.shutdown()
        manifest.close()
        again = Manifest(Path(folder) / "out", options.jobs).done.count
        seconds = time.monotonic() - begun
        print(
            f"{tally.done} of {options.jobs} jobs done, {tally.again} begun anew, {tally.failed} failed, "
            f"{again} in the manifest; {seconds:.0f} s, {1000 * seconds / options.jobs:.2f} ms a job in all, "
            f"{1000 * tally.dispatch / options.jobs:.2f} ms in dispatch"
        )
        return 0 if again == tally.done == options.jobs - tally.failed else 1


if __name__ == "__main__":
    sys.exit(main())
