"""Runs in the host's Python: `run_kept.py host pack` keeps runs on disk and looks there when the page is told.

Prints, as JSON, for each run the pairs of chunks that were told as finished and chunks that a kill at that moment would
leave; runs with a side stream are on a pretended device, which copies as late as it may.
"""

import json
import sys
import tempfile
from pathlib import Path

from in_host import of_pack

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

import server  # isort: skip
import torch
from late_device import pretend_streams

build, guidance = of_pack("flowcache_core.engine.build"), of_pack("flowcache_core.engine.guidance")
loop, wan = of_pack("flowcache_core.engine.loop"), of_pack("flowcache_core.models.wan")
presets, schedules = of_pack("flowcache_core.models.presets"), of_pack("flowcache_core.schedule")
levels, one_step = of_pack("flowcache_core.solvers.noise_levels"), of_pack("flowcache_core.solvers.one_step")
streams, run_folder = of_pack("flowcache_core.history.streams"), of_pack("flowcache_core.storage.run_folder")
finished = of_pack("nodes.comfyui.finished")

CHUNKS, STEPS, SHAPE = 5, 6, (1, 4, 2, 6, 4)
TINY = wan.WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)


def engine_of(lag: int):
    """A small run of random weights."""
    torch.manual_seed(0)
    backbone = wan.WanBackbone(wan.WanNetwork(TINY).requires_grad_(False))
    sampling = loop.Sampling(levels.magi(STEPS), lambda chunk: one_step.chunk_noise(4, chunk, SHAPE))
    text = guidance.classifier_free(torch.randn(1, 5, TINY.text_dim))
    return build.build_engine(
        build.RunSettings(
            backbone,
            text,
            schedules.ChunkSchedule(CHUNKS, STEPS, lag),
            presets.preset("off"),
            sampling,
            "causal",
            SHAPE,
            1,
            torch.float32,
            torch.device("cpu"),
        )  # fmt: skip
    )


def kept(lag: int, side) -> list[tuple[int, int]]:
    """One run: chunks that were told as finished, and chunks on disk, each time that the page is told something."""
    pairs = []
    with tempfile.TemporaryDirectory() as root:

        def folder():
            return run_folder.RunFolder(Path(root), "0" * 32, 2**30, first=0, chunk_frames=SHAPE[2])

        class Page:
            def send_progress_text(self, text: str, node_id: str) -> None:
                words = text.split()
                there = folder().load()
                pairs.append((int(words[1]) - 1, there.chunks if there else 0))

        server.PromptServer.instance = Page()
        engine = engine_of(lag)
        listener = finished.FinishedChunks(folder(), None, True, "1", engine.report, 0, side=side)
        listener.begin((), range(0))
        engine.on_progress = lambda told: listener.progress(told, engine)
        for chunk in engine.run():
            listener.chunk(chunk, engine)
        listener.done(engine, keeps_history=True)
        return pairs


plain = {f"lag {lag}": kept(lag, streams.AT_ONCE) for lag in (2, 3, STEPS)}
pretend_streams(streams, setattr)
side = {f"lag {lag}, side stream": kept(lag, streams.SideStream(torch.device("cpu"))) for lag in (2, 3, STEPS)}
print("RESULT " + json.dumps(plain | side))
