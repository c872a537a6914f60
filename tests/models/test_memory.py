"""The memory of a run, worked out before it begins: against what runs allocate, and small enough for one GPU."""

import json
import struct
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from flowcache_core import __main__ as cli
from flowcache_core.checkpoints import CheckpointInfo, stamp
from flowcache_core.engine.build import RunSettings, build_engine
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine, Sampling
from flowcache_core.errors import UserError
from flowcache_core.history.plan import MemoryPlan
from flowcache_core.models.families import FAMILIES, Family, family_preset
from flowcache_core.models.magi.config import MAGI_4_5B
from flowcache_core.models.magi.memory import plan_magi
from flowcache_core.models.memory import plan_wan, rolling_history_bytes, wan_frames
from flowcache_core.models.wan import WanBackbone, WanConfig, WanNetwork
from flowcache_core.report import megabytes
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import BY_FRAMES, OFF, Compression, Drift, Every, HistorySettings, Settings

WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)  # wan/configs/wan_t2v_1_3B.py
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)  # wan/configs/wan_t2v_14B.py
NARROW = WanConfig(dim=24, ffn_dim=8, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)
GIB = 2**30
# As many chunks active at once as in the family's own schedule, in fewer steps.
SKYREELS = replace(FAMILIES["skyreels"], steps=10, lag=1)
CAUSAL = replace(FAMILIES["causal"], steps=1, lag=1)
CASES = {
    "SkyReels-V2, 97 frames": (SKYREELS, (320, 192), 97),
    "Self-Forcing, one minute": (CAUSAL, (416, 240), 60 * 16 + 1),
}


def stub(path, network: nn.Module, info: CheckpointInfo):
    """A file with a network's names and shapes in bfloat16, whose weights take no room on disk."""
    told: dict = {"__metadata__": stamp(info)}
    end = 0
    for name, tensor in network.state_dict().items():
        told[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * prod(tensor.shape)]}
        end += 2 * prod(tensor.shape)
    header = json.dumps(told).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def skyreels(config: WanConfig, budget: int, relative: bool) -> MemoryPlan:
    settings = family_preset("balanced", "skyreels", config.dim, HistorySettings(budget, BY_FRAMES, relative))
    return plan_wan(config, FAMILIES["skyreels"], (960, 544), 737, settings, lag=5)


def magi(relative: bool) -> MemoryPlan:
    settings = family_preset("balanced", "magi", MAGI_4_5B.width, HistorySettings(1, BY_FRAMES, relative))
    return plan_magi(MAGI_4_5B, (1280, 720), 737, settings)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_half_a_minute_of_the_published_models_fits_one_gpu(relative):
    """In bfloat16, with all branches of guidance. Before layers shared a scratch it was 44.1, 180.3 and 16.9 GiB, and
    51.3, 209.7 and 16.9 with relative positions."""
    assert skyreels(WAN_1_3B, 2, relative).history_bytes <= 10 * GIB
    assert skyreels(WAN_14B, 1, relative).history_bytes <= 22 * GIB
    assert magi(relative).history_bytes <= 4 * GIB


def test_info_tells_it_from_a_file(tmp_path, capsys):
    path = tmp_path / "stub.safetensors"
    with torch.device("meta"):
        network = WanNetwork(WAN_1_3B)
    stub(path, network, CheckpointInfo("skyreels", WAN_1_3B, torch.bfloat16, "wan", "", {}, 0))
    asked = ["--width", "960", "--height", "544", "--seconds", f"{736 / 24}", "--lag", "5", "--budget", "2"]
    assert cli.main(["info", str(path), *asked, "--relative", "--preset", "balanced"]) == 0
    said, plan = capsys.readouterr().out, skyreels(WAN_1_3B, 2, True)
    assert f"960x544, {wan_frames(FAMILIES['skyreels'], 737)} frames (30.7 s), 37 chunks" in said
    history, unbounded = megabytes(plan.history_bytes), megabytes(plan.unbounded_bytes)
    assert f"history   {history} in bfloat16, 2 finished chunks kept; {unbounded} unbounded" in said
    assert f"{megabytes(plan.stored_bytes // 30)} in each of 30 layers, scratch {megabytes(plan.scratch_bytes)}" in said
    assert f"about {megabytes(plan.activation_bytes)}, texts {megabytes(plan.context_bytes)}" in said
    assert f"in all    {megabytes(plan.bytes)} beside the weights" in said
    watching = ["--preset", "paper slow"]  # its chunks recompute on different ticks
    assert cli.main(["info", str(path), *asked, *watching]) == 0
    assert f"history   {history}" not in capsys.readouterr().out


def test_magi_keeps_to_it_without_a_budget_too():
    assert plan_magi(MAGI_4_5B, (1280, 720), 737, Settings()).history_bytes <= 4 * GIB


def test_the_scratch_is_for_all_layers():
    settings = Settings(history=HistorySettings(2, BY_FRAMES))
    plan = plan_wan(WAN_1_3B, FAMILIES["skyreels"], (960, 544), 737, settings, lag=5)
    twice = plan_wan(replace(WAN_1_3B, num_layers=60), FAMILIES["skyreels"], (960, 544), 737, settings, lag=5)
    assert twice.stored_bytes == 2 * plan.stored_bytes and twice.scratch_bytes == plan.scratch_bytes > 0
    assert plan.history_bytes == plan.stored_bytes + plan.scratch_bytes + plan.query_bytes
    assert plan.bytes == plan.history_bytes + plan.activation_bytes + plan.context_bytes + plan.table_bytes


def finished(family: Family, size: tuple[int, int], frames: int, settings: Settings) -> Engine:
    """A run of a narrow network, done."""
    torch.manual_seed(0)
    network = WanNetwork(NARROW).to(torch.bfloat16).requires_grad_(False)
    shape = (1, 4, family.chunk_frames, size[1] // 8, size[0] // 8)
    chunks = (wan_frames(family, frames) + 3) // 4 // family.chunk_frames
    text, noise = (torch.randn(size, dtype=torch.bfloat16) for size in ((1, 1, NARROW.text_dim), shape))
    levels = [1 - step / family.steps for step in range(family.steps + 1)]
    run = RunSettings(
        WanBackbone(network), classifier_free(text, text + 1, family.guidance),
        ChunkSchedule(chunks, family.steps, family.lag), settings, Sampling(levels, lambda chunk: noise), "causal",
        shape, 1 if family.guidance == 1.0 else 2, torch.bfloat16, torch.device("cpu"),
        attention=lambda q, k, v: q,  # its time does not matter here; what is kept does
    )  # fmt: skip
    engine = build_engine(run)
    for _ in engine.run():
        pass
    engine.save()
    return engine


HISTORIES = {
    "whole": HistorySettings(),
    "budget": HistorySettings(3, Compression(queries=1)),
    "relative window": HistorySettings(3, Compression("window"), relative=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("history", "clean_pass"), [("whole", True), ("budget", True), ("budget", False), ("relative window", True)]
)
def test_a_run_allocates_what_was_planned(name, history, clean_pass):
    family, size, frames = CASES[name]
    settings = replace(OFF, history=HISTORIES[history], clean_pass=clean_pass)
    plan = plan_wan(NARROW, family, size, frames, settings)
    engine = finished(family, size, frames, settings)
    report, tensors = engine.report, {}
    for kept in engine.forward.histories.values():
        layers = [part.here for layer in (*kept.layers, *([kept.scratch] if kept.scratch else [])) for part in layer]
        for part in (*layers, kept.tokens, *([] if kept.queries is None else [kept.queries])):
            tensors[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    assert sum(tensors.values()) == pytest.approx(plan.history_bytes, rel=0.02)
    assert report.history_bytes_planned == plan.history_bytes
    assert report.history_bytes_allocated == pytest.approx(plan.history_bytes, rel=0.02)
    assert report.history_bytes_unbounded == plan.unbounded_bytes
    assert report.history_bytes_peak <= report.history_bytes_allocated


def test_chunks_that_recompute_on_different_ticks_keep_their_keys_in_every_layer():
    """`balanced` shares a scratch; a rule that watches each chunk by itself cannot."""
    history = HistorySettings(2)
    shared, stored = (
        plan_wan(WAN_1_3B, FAMILIES["skyreels"], (960, 544), 737, Settings(reuse, history=history), 5)
        for reuse in (Every(5), Drift(0.1))
    )
    assert shared.history_bytes < stored.history_bytes / 3


@pytest.mark.parametrize("name", CASES)
def test_at_full_width(name):
    """Keys and values in bfloat16, and a number of 4 bytes a token and head."""
    family, size, frames = CASES[name]
    plan = plan_wan(WAN_1_3B, family, size, frames, Settings())
    tokens = (size[0] // 16) * (size[1] // 16) * plan.total_chunks * family.chunk_frames
    branches = 2 if family is SKYREELS else 1
    assert plan.history_bytes == plan.unbounded_bytes == branches * 30 * tokens * (2 * 1536 * 2 + 12 * 4)


def test_with_a_budget_a_longer_video_takes_no_more():
    settings = Settings(history=HistorySettings(6))
    planned = [plan_wan(WAN_1_3B, FAMILIES["causal"], (832, 480), frames, settings) for frames in (961, 9601)]
    assert planned[0].history_bytes == planned[1].history_bytes < planned[0].unbounded_bytes


@pytest.mark.parametrize("chunks", [3, 12])
def test_rolling_forcing(chunks):
    family = FAMILIES["rolling"]
    network, noise = WanNetwork(NARROW).to(torch.bfloat16).requires_grad_(False), torch.randn(1, 4, 3, 8, 8).bfloat16()
    sampling = Sampling(family.levels(5), lambda chunk: noise, lambda chunk, step: noise)
    text = torch.randn(1, 1, NARROW.text_dim, dtype=torch.bfloat16)
    schedule = ChunkSchedule(chunks, family.steps, family.lag)
    run = RunSettings(
        WanBackbone(network), classifier_free(text), schedule, OFF, sampling, "rolling", noise.shape, 1,
        torch.bfloat16, torch.device("cpu"),
    )  # fmt: skip
    engine = build_engine(run)
    for _ in engine.run():
        pass
    planned = rolling_history_bytes(NARROW, family, (64, 64), 4 * chunks * family.chunk_frames - 3)
    assert planned == engine.forward.history_bytes[0] == engine.report.history_bytes_planned


@pytest.mark.parametrize(
    ("size", "frames", "lag", "words"),
    [((4, 64), 9, None, "4 x 64 pixels"), ((64, 64), 0, None, "0 frames"), ((64, 64), 9, 99, "lag is 99")],
)
def test_impossible_videos_are_told(size, frames, lag, words):
    with pytest.raises(UserError, match=words):
        plan_wan(NARROW, FAMILIES["skyreels"], size, frames, Settings(), lag)
