"""How many videos two workers make in the time of one: `python -m flowcache_core.lab.throughput`.

The workers are those of the command batch, on Ray: a ComfyUI each, on the processor, with one thread. Both are there
all the time, with the demo model loaded; runs with one and with both alternate. So do, for comparison, as many
processes that make the same videos and nothing else: cores that share caches, memory and clock give less than their
number, and no dispatcher can give more. Adds "throughput" to report.json.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path

import torch

from ..batch.command import default_host
from ..batch.dispatch import Ended, Tally, Workers, dispatch
from ..batch.host import HostSettings
from ..batch.jobs import Job
from ..batch.manifest import Manifest
from ..demo import embed_caption, load_network
from ..errors import UserError
from ..generation import generate
from .comfy import Graph
from .report_file import add_to_report

DEMO = "demo model (ships with FlowCache)"
STEPS = 16


class Some:
    """The first so many of some workers."""

    def __init__(self, workers: Workers, count: int):
        self.workers, self.count = workers, count
        self.begin, self.ended, self.replace = workers.begin, workers.ended, workers.replace

    def names(self) -> Sequence[Hashable]:
        """Those who are there."""
        return self.workers.names()[: self.count]


def video(seed: int, chunks: int) -> dict:
    """A workflow of the demo model whose latents are saved; a worker has its model after the first one."""
    graph = Graph()
    model = graph.add("FlowCacheLoadARVideoModel", model_name=DEMO, family="auto", weight_type="default"), 0
    texts = [(graph.add("FlowCacheDemoPrompt", caption=caption), 0) for caption in ("a red circle", "")]
    node = graph.add(
        "FlowCacheAutoregressiveExtend", model=model, positive=texts[0], negative=texts[1], seed=seed, chunks=chunks,
        steps=STEPS, guidance=0.0, frames_per_chunk=0, lag=-1, width=0, height=0,
    )  # fmt: skip
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="throughput")
    return dict(graph)


def seconds_of(workers: Workers, graphs: Sequence[dict], folder: Path) -> float:
    """How long some workers take for all of some workflows.

    Raises:
        UserError: one of them failed.
    """
    jobs = [Job(number, graph, f"{number:016x}", DEMO) for number, graph in enumerate(graphs, start=1)]
    manifest, tally = Manifest(folder, len(jobs)), Tally(len(jobs))
    why: list[str] = []

    def take(job: Job, ended: Ended) -> dict:
        if not ended.files:
            why.append("a video came without its file")
        return {}

    begun = time.perf_counter()
    dispatch(jobs, workers, manifest, tally, take)
    took = time.perf_counter() - begun
    manifest.close()
    if tally.done < len(jobs) or why:
        raise UserError(f"{len(jobs) - tally.done} of {len(jobs)} videos failed: {manifest.path.read_text()[-500:]}")
    return took


def measure(workers: Workers, videos: int, chunks: int, pairs: int, folder: Path, told: Callable[[str], None]) -> dict:
    """Times one worker and all of them, in alternation, each video with a seed of its own.

    Returns:
        Seconds of each run, and the ratio of their medians.
    """
    seeds = iter(range(1, 10**6))
    every = len(workers.names())
    seconds: dict[int, list[float]] = {1: [], every: []}

    def run(count: int, how_many: int) -> float:
        graphs = [video(next(seeds), chunks) for _ in range(how_many)]
        return seconds_of(Some(workers, count), graphs, folder / str(next(seeds)))

    run(every, every)  # loads the models
    for pair in range(pairs):
        for count, found in seconds.items():
            found.append(run(count, videos))
            told(f"{videos} videos, {count} worker{'s' if count > 1 else ''}, run {pair + 1}: {found[-1]:.1f} s")
    one, both = (statistics.median(found) for found in seconds.values())
    return {"workers": every, "videos": videos, "chunks": chunks, "steps": STEPS, "seconds": list(seconds.values()),
            "ratio": round(one / both, 3)}  # fmt: skip


def bare_ratio(count: int, videos: int, chunks: int, pairs: int) -> float:
    """How many times as many videos as one some processes make that do nothing else, with a thread each."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[int, list[float]] = {1: [], count: []}
    with context.Pool(count, _ready) as pool:
        pool.map(_make, [(seed, 1, 1) for seed in range(2 * count)], chunksize=1)
        for _ in range(pairs):
            for working, found in seconds.items():
                begun = time.perf_counter()
                shares = [(seed, chunks, len(range(seed, videos, working))) for seed in range(working)]
                pool.map(_make, shares, chunksize=1)
                found.append(time.perf_counter() - begun)
    one, several = (statistics.median(found) for found in seconds.values())
    return one / several


def _ready() -> None:
    torch.set_num_threads(1)


_network = cache(load_network)  # loaded once a process, by its first video


def _make(what: tuple[int, int, int]) -> None:
    seed, chunks, videos = what
    for number in range(videos):
        generate(
            _network(), embed_caption("a red circle"), chunks, steps=STEPS, lag=STEPS // 4, seed=1000 * seed + number
        )


def main(arguments: list[str] | None = None) -> None:
    """Measures, or says in one line why it cannot."""
    parser = argparse.ArgumentParser(prog="python -m flowcache_core.lab.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="of report.json (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=8, help="of each run (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=4, help="of a video (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="runs with one and with both (default: %(default)s)")
    options = parser.parse_args(arguments)
    host = default_host()
    if not (host / "main.py").exists():
        print(f"Throughput is not measured: there is no ComfyUI at {host}; set COMFYUI_PATH.")
        return
    try:
        from ..batch.on_ray import RayWorkers
    except UserError as error:
        print(f"Throughput is not measured. {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = HostSettings(host.resolve(), Path(folder) / "runs", ("--cpu",))
        workers = RayWorkers(settings, 2, threads=1)
        try:
            found = measure(workers, options.videos, options.chunks, options.pairs, Path(folder), print)
        finally:
            workers.close()
    bare = bare_ratio(2, options.videos, options.chunks, options.pairs)
    add_to_report(options.out, "throughput", found | {"processors": os.cpu_count(), "bare_ratio": round(bare, 3)})
    print(
        f"2 workers with one thread each make {found['ratio']:.2f} times as many videos as 1 ({os.cpu_count()} cores); "
        f"2 processes that do nothing else make {bare:.2f} times as many"
    )


if __name__ == "__main__":
    main()
