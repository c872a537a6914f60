"""FlowCache against the host's own caches, in ComfyUI, on its native path: SamplerARVideo under SamplerCustomAdvanced.

    python tests/host/bench_host.py --out out/bench

adds "host" to report.json there. `make bench` calls it where a ComfyUI is found (COMFYUI_PATH, else ~/comfy/ComfyUI).
Every run is the demo model's, 24 steps a chunk; times are those between the sampler node's start and its end, medians
of runs in alternation, after one that loads the model.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from flowcache_core.lab.likeness import decibels, pixels  # noqa: E402
from flowcache_core.lab.report_file import add_to_report  # noqa: E402
from flowcache_core.models.latent_spaces import WAN_21_MEAN, WAN_21_STD  # noqa: E402
from tests.helpers.host.comfy_server import HOST, Outcome, Server  # noqa: E402
from tests.helpers.host.graph import Graph, native  # noqa: E402

BLOCK = 3  # latent frames of a chunk


@dataclass(frozen=True)
class Way:
    """A node between loader and sampler, or none, with its inputs."""

    name: str
    setting: str
    node: str | None = None
    inputs: dict = field(default_factory=dict)


def flowcache(every: int) -> Way:
    inputs = {"preset": "custom", "history_budget": 0, "policy": "even", "every": every, "warmup": 1}
    return Way("ours", f"every {every}th", "FlowCache", inputs)


def hosts(node: str, threshold: float) -> Way:
    inputs = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    return Way(node, f"threshold {threshold:g}", node, inputs)


WAYS = (
    Way("plain", "every step"),
    hosts("EasyCache", 0.2),
    hosts("LazyCache", 0.2),
    flowcache(2),
    flowcache(4),
    hosts("LazyCache", 0.5),
    hosts("EasyCache", 0.5),
)


class Failed(Exception):
    """A way that the host cannot run; the message is its own."""


def run(server: Server, way: Way, chunks: int, steps: int, seed: int) -> tuple[float, torch.Tensor]:
    """Seconds inside the sampler node, and the latent it gave, as the network sees it."""
    graph = Graph()
    loaded = (
        graph.add(
            "FlowCacheLoadARVideoModel",
            model_name="demo model (ships with FlowCache)",
            family="auto",
            weight_type="default",
        ),
        0,
    )
    if way.node:
        loaded = graph.add(way.node, model=loaded, **way.inputs), 0
    sampler = native(graph, loaded, chunks * BLOCK, steps, block=BLOCK, seed=seed)
    save = graph.add("SaveLatent", samples=(sampler, 0), filename_prefix="bench")
    begun: dict[str, float] = {}

    def on_event(kind: str, data) -> None:
        if kind == "executing" and data.get("node"):
            begun.setdefault(data["node"], time.perf_counter())

    outcome: Outcome = server.run(graph, timeout=600, on_event=on_event)
    if outcome.error is not None:
        raise Failed(outcome.error["exception_message"].strip())
    (file,) = server.saved(outcome, save)
    raw = load_file(file)["latent_tensor"]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (WAN_21_MEAN, WAN_21_STD))
    return begun[save] - begun[sampler], (raw - mean) / std


@dataclass
class Row:
    """What was measured of a way, and the host's message where it fails."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    failed: str = ""

    def as_dict(self, plain_seconds: float) -> dict:
        took = statistics.median(self.seconds) if self.seconds else None
        return {
            "method": self.way.name,
            "setting": self.way.setting,
            "seconds": took and round(took, 4),
            "speedup": took and round(plain_seconds / took, 3),
            "psnr": round(statistics.mean(self.psnr), 3) if self.psnr else None,
            "failed": self.failed,
        }


def measure(server: Server, chunks: int, steps: int, pairs: int) -> list[dict]:
    rows = [Row(way) for way in WAYS]
    run(server, WAYS[0], 1, 4, seed=99)
    for seed in range(pairs):
        plain = None
        for row in rows:
            if row.failed:
                continue
            try:
                took, latent = run(server, row.way, chunks, steps, seed)
            except Failed as error:
                row.failed = str(error)
                continue
            row.seconds.append(took)
            shown = pixels(latent)
            if plain is None:
                plain = shown
            else:
                row.psnr.append(decibels(shown, plain))
    plain_seconds = statistics.median(rows[0].seconds)
    return [row.as_dict(plain_seconds) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="where report.json is (default: %(default)s)"
    )
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    if not (HOST / "main.py").exists():
        print(f"The host is not measured: there is no ComfyUI at {HOST}; set COMFYUI_PATH.")
        return
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            rows = measure(server, options.chunks, options.steps, options.pairs)
        finally:
            server.stop()
    told = {"chunks": options.chunks, "steps": options.steps, "pairs": options.pairs, "rows": rows}
    add_to_report(options.out, "host", told)
    for row in rows:
        alike = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        told = row["failed"] or f"{row['seconds']:7.2f} s {row['speedup']:5.2f}x {alike}"
        print(f"{row['method']:10} {row['setting']:14} {told}")


if __name__ == "__main__":
    main()
