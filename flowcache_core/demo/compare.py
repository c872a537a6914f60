"""The same video three times: plain, with FlowCache, and with FlowCache and less than half of the history.

`python -m flowcache_core demo` (or `make demo`) writes videos, a side-by-side animation, report.png and report.json.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..generation import Result, generate
from ..history.plan import plan_memory
from ..media.metrics import psnr, ssim
from ..media.pictures import Run, comparison_picture, side_by_side
from ..media.progress_bar import Bar
from ..media.video import enlarged, frames_of, save_animation, save_video
from ..models.presets import DEFAULT_PRESET, preset
from ..models.wan import WanBackbone
from ..report import megabytes
from ..schedule import ChunkSchedule
from ..settings import BY_FRAMES, Settings
from ..storage.files import check_writable, write_whole
from .captions import embed_caption
from .clips import FPS
from .codec import TIME
from .detector import detect, parse_caption
from .model import decode, load_network
from .train_network import FRAMES_PER_CHUNK

STEPS, WINDOW = 64, 4  # MAGI-1's schedule
LATENT = (8, 8)  # height and width
CAPTION = "a magenta triangle"
FRAME_TOKENS = 16  # the newest frame asks what stays: whole chunks of queries would take half a chunk of memory
HISTORY_SHARE = 0.45  # of the whole history, the most that the third run may take


@dataclass(frozen=True)
class Made:
    """One of the three runs. `pixels` is [3, T, H, W] in [-1, 1]."""

    name: str
    result: Result
    seconds: float
    pixels: Tensor
    score: float


def compare(out: Path, caption: str = CAPTION, chunks: int = 16, seed: int = 0, network: Path | None = None) -> dict:
    """Makes the three runs, writes everything into the folder `out` and returns what report.json holds.

    Runs are timed by the wall clock, after a warm-up, from a loaded network to finished latents.

    Raises:
        UserError: a caption that the demo cannot check, too few chunks, a folder that cannot be written to.
    """
    try:
        parse_caption(caption)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_writable(out / "report.json")
    backbone = load_network() if network is None else load_network(network)
    text = embed_caption(caption)
    budget = budget_of(backbone, chunks)
    if budget < 1:
        least = next(count for count in range(1, 99) if budget_of(backbone, count))
        raise UserError(f"{chunks} chunks are too few to cut the history of; the demo needs at least {least}.")

    def run(name: str, settings: Settings) -> Made:
        begun = time.perf_counter()
        result = generate(
            backbone,
            text,
            chunks,
            steps=STEPS,
            lag=STEPS // WINDOW,
            settings=settings,
            seed=seed,
            frames_per_chunk=FRAMES_PER_CHUNK,
            on_progress=Bar(f"{name:14}", chunks),
        )
        seconds = time.perf_counter() - begun
        pixels = decode(result.latents, FRAMES_PER_CHUNK)
        return Made(name, result, seconds, pixels, detect(pixels, caption).score)

    generate(backbone, text, 4, steps=8, lag=2, settings=preset(DEFAULT_PRESET, 1), frames_per_chunk=FRAMES_PER_CHUNK)
    made = [
        run("plain", preset("off")),
        run("FlowCache", preset(DEFAULT_PRESET)),
        run("short history", short_settings(budget)),
    ]
    numbers = figures(*made) | {"caption": caption, "seed": seed, "budget": budget}
    numbers["runs"] = {one.name: one.result.report.as_dict() for one in made}
    _write(out, made, numbers)
    return numbers


def short_settings(budget: int) -> Settings:
    """Makes the third run's settings."""
    return preset(DEFAULT_PRESET, budget, replace(BY_FRAMES, queries=FRAME_TOKENS))


def budget_of(backbone: WanBackbone, chunks: int) -> int:
    """Finds the most clean chunks that take no more than `HISTORY_SHARE` of the whole history; 0 if none do."""
    schedule = ChunkSchedule(chunks, STEPS, STEPS // WINDOW)
    for budget in range(chunks - 1, 0, -1):
        settings = short_settings(budget)
        plan = plan_memory(
            backbone.sizes,
            schedule,
            settings,
            settings.reuse.policy(schedule),
            grid=backbone.grid(*LATENT),
            chunk_frames=FRAMES_PER_CHUNK,
            itemsize=4,
        )
        if plan.history_bytes <= HISTORY_SHARE * plan.unbounded_bytes:
            return budget
    return 0


def figures(plain: Made, fast: Made, short: Made) -> dict:
    """The numbers of report.json: seconds, ratios, dB, bytes; the detector's scores and overhead from 0 to 1."""
    report, bounded = fast.result.report, short.result.report
    return {
        "chunks": report.chunks_done,
        "seconds_plain": round(plain.seconds, 3),
        "seconds_flowcache": round(fast.seconds, 3),
        "speedup": round(plain.seconds / fast.seconds, 3),
        "psnr": round(psnr(fast.pixels, plain.pixels, span=2.0), 3),
        "ssim": round(ssim(fast.pixels, plain.pixels, span=2.0), 5),
        "forwards_total": report.forwards_total,
        "forwards_executed": report.forwards_executed,
        "overhead": round(report.overhead, 5),
        "detector_plain": round(plain.score, 5),
        "detector_flowcache": round(fast.score, 5),
        "seconds_budget": round(short.seconds, 3),
        "psnr_budget": round(psnr(short.pixels, plain.pixels, span=2.0), 3),
        "ssim_budget": round(ssim(short.pixels, plain.pixels, span=2.0), 5),
        "detector_budget": round(short.score, 5),
        "history_bytes_peak": bounded.history_bytes_peak,
        "history_bytes_unbounded": bounded.history_bytes_unbounded,
    }


def table(numbers: dict) -> str:
    """The three runs in columns, for a terminal."""
    runs = numbers["runs"]
    rows = [
        ("", *runs),
        ("seconds", *(f"{numbers[f'seconds_{run}']:.2f}" for run in ("plain", "flowcache", "budget"))),
        (
            "faster",
            "",
            *(f"{numbers['seconds_plain'] / numbers[f'seconds_{run}']:.1f}x" for run in ("flowcache", "budget")),
        ),
        ("forwards", *(f"{run['forwards_executed']:,}" for run in runs.values())),
        ("overhead", *(f"{run['overhead']:.1%}" for run in runs.values())),
        ("PSNR to plain, dB", "", f"{numbers['psnr']:.1f}", f"{numbers['psnr_budget']:.1f}"),
        ("SSIM to plain", "", f"{numbers['ssim']:.3f}", f"{numbers['ssim_budget']:.3f}"),
        ("caption found in frames", *(f"{numbers[f'detector_{run}']:.1%}" for run in ("plain", "flowcache", "budget"))),
        ("history at its peak", *(megabytes(run["history_bytes_peak"]) for run in runs.values())),
    ]
    return "\n".join(f"{name:24}" + "".join(f"{value:>16}" for value in values) for name, *values in rows)


def _write(out: Path, made: list[Made], numbers: dict) -> None:
    frames: dict[str, np.ndarray] = {one.name: frames_of(one.pixels) for one in made}
    for name, images in frames.items():
        save_video(enlarged(images, 4), out / f"{name.replace(' ', '_').lower()}.mp4", FPS)
    save_animation(side_by_side(list(frames.items()), FRAMES_PER_CHUNK * TIME, times=3), out / "side_by_side.webp", FPS)
    likeness = [None, (numbers["psnr"], numbers["ssim"]), (numbers["psnr_budget"], numbers["ssim_budget"])]
    runs = []
    for one, alike in zip(made, likeness, strict=True):
        report = one.result.report
        facts = [
            f"{one.seconds:.1f} s, {report.forwards_executed:,} forwards",
            f"PSNR {alike[0]:.1f} dB, SSIM {alike[1]:.3f}" if alike else "every step recomputed",
            f"history up to {megabytes(report.history_bytes_peak)}",
            f"caption found in {one.score:.1%}",
        ]
        runs.append(Run(one.name, report, frames[one.name], facts))
    picture = comparison_picture(
        f"FlowCache demo: a video of {numbers['chunks']} chunks, three times",
        f'"{numbers["caption"]}", seed {numbers["seed"]}, {STEPS} steps, window {WINDOW}, '
        f"{len(runs[0].frames)} frames of {runs[0].frames.shape[1]} pixels",
        runs,
        [
            (f"{numbers['speedup']:.1f}x", "faster than plain"),
            (f"{numbers['psnr']:.1f} dB", "PSNR to plain"),
            (f"{numbers['ssim']:.3f}", "SSIM to plain"),
            (f"{numbers['history_bytes_peak'] / numbers['history_bytes_unbounded']:.0%}", "of the history, third run"),
        ],
    )
    write_whole(out / "report.png", picture.save)
    write_whole(out / "report.json", lambda partial: partial.write_text(json.dumps(numbers, indent=1) + "\n"))
