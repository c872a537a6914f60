"""What must hold on a card: goldens of upstream, the same bits twice, equal results wherever equality is promised."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..demo import embed_caption, load_network
from ..generation import Result, generate
from ..history.offload import TOO_LITTLE
from ..models.presets import preset
from ..models.wan import WanBackbone
from ..settings import OFF, HistorySettings, HistoryType, Settings

REPOSITORY = Path(__file__).parents[2]
GOLDENS = (  # tests that hold our runs against upstream's, in float32 and, where they say so, in bfloat16
    "tests/engine/test_golden_causal.py::test_whole_run",
    "tests/engine/test_golden_causal.py::test_one_forward",
    "tests/engine/test_golden_comfy.py::test_every_chunk_over_its_history",
    "tests/engine/test_golden_skyreels.py::test_whole_run",
    "tests/engine/test_golden_skyreels.py::test_published_presets",
    "tests/engine/test_golden_joint.py::test_whole_window",
    "tests/engine/test_golden_joint.py::test_rolling_forcing",
    "tests/engine/test_golden_joint.py::test_rolling_forward_in_bfloat16",
    "tests/models/magi/test_engine.py::test_every_steps_latent",
    "tests/models/magi/test_engine.py::test_published_flowcache",
    "tests/models/magi/test_engine.py::test_bfloat16_is_near_the_float32_golden",
    "tests/history/test_golden_compression.py::test_magi",
    "tests/history/test_golden_compression.py::test_skyreels",
)
DEVICE_VARIABLE = "FLOWCACHE_TEST_DEVICE"  # where those tests run
SIZE, CHUNKS, STEPS, LAG = (8, 8), 4, 4, 2
TYPES: tuple[HistoryType, ...] = ("as computed", "int8", "int4")
PRECISIONS = (torch.float32, torch.bfloat16)
LARGE, MANY = (48, 48), 12  # latent size and chunks of a history that a card notices


@dataclass(frozen=True)
class Check:
    """One thing that must hold: what was found, and whether it does."""

    name: str
    found: str
    holds: bool


def goldens(device: torch.device, seconds: float, tests: tuple[str, ...] = GOLDENS) -> Iterator[Check]:
    """Runs the golden tests on a device, TF32 off."""
    if not (REPOSITORY / tests[0].partition("::")[0]).exists():
        return
    environment = os.environ | {DEVICE_VARIABLE: str(device), "NVIDIA_TF32_OVERRIDE": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", *tests]
    try:
        ran = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        yield Check("goldens of upstream", f"not through after {seconds:.0f} s", False)
        return
    lines = ran.stdout.strip().splitlines() or ran.stderr.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield Check("goldens of upstream", "; ".join([*failed, lines[-1]]), ran.returncode == 0)


def equalities(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = PRECISIONS, types: tuple[HistoryType, ...] = TYPES
) -> Iterator[Check]:
    """Runs the demo model in each precision, each setting against the one that it must equal to the bit."""
    bounded = preset("balanced", budget=1)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        network = demo_network(device, dtype)
        for kept in types:
            settings = replace(bounded, history=replace(bounded.history, type=kept))
            first = video(network, settings, device, dtype)
            others: dict[str, Settings] = {
                "the same seed again": settings,
                "without the side stream": replace(settings, overlap=False),
                "history in system memory": replace(settings, history=replace(settings.history, memory="system")),
            }
            for what, other in others.items():
                apart = difference(video(network, other, device, dtype).latents, first.latents)
                yield Check(f"{name}, history {kept}: {what}", f"differs by {apart:.1e}", apart == 0.0)


def out_of_memory(device: torch.device) -> Iterator[Check]:
    """Takes memory away from a run with the whole history: it must end in the same video. CUDA alone."""
    if device.type != "cuda":
        return
    network, settings = demo_network(device, torch.float32), replace(OFF, history=HistorySettings())

    def run() -> Result:
        return video(network, settings, device, torch.float32, LARGE, MANY)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    expected = run()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    allowed = before + 0.6 * (peak - before)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        found = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    moved = [note for note in found.report.notes if note.startswith(TOO_LITTLE)]
    apart = difference(found.latents, expected.latents)
    words = f"differs by {apart:.1e}; {moved[0] if moved else 'nothing moved'}"
    yield Check("with 60% of the memory that it takes", words, apart == 0.0 and bool(moved))


def demo_network(device: torch.device, dtype: torch.dtype) -> WanBackbone:
    """Loads the demo model for a device, in a precision."""
    backbone = load_network()
    backbone.network.to(device, dtype)
    backbone.network.patch_embedding.float()
    return backbone


def video(
    network: WanBackbone,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    size: tuple[int, int] = SIZE,
    chunks: int = CHUNKS,
) -> Result:
    """Generates a short video of two captions' worth of guidance."""
    text, null = (embed_caption(words).to(device, dtype) for words in ("a red circle", ""))
    return generate(
        network, text, chunks, steps=STEPS, lag=LAG, settings=settings, seed=1, negative=null, guidance_scale=3.0,
        latent_size=size,
    )  # fmt: skip


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one between two latents."""
    return (found.float() - expected.float()).abs().max().item()


def checks(device: torch.device, seconds: float, toy: bool) -> list[Callable[[], Iterator[Check]]]:
    """Lists what is checked, most important first; a toy run takes one of each kind."""
    tests, precisions, types = (GOLDENS[-1:], PRECISIONS[:1], TYPES[1:2]) if toy else (GOLDENS, PRECISIONS, TYPES)
    return [
        lambda: equalities(device, precisions, types),
        lambda: goldens(device, seconds, tests),
        lambda: out_of_memory(device),
    ]
