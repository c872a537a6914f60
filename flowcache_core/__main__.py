"""The command line: `python -m flowcache_core generate "a red circle"`; `--help` lists the rest."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import checkpoints
from .batch.command import default_host, run_batch
from .checkpoints import magi_files
from .command_generate import run_generate
from .demo.compare import CAPTION, compare, table
from .engine.from_video import STRENGTH
from .engine.loop import Cancelled
from .errors import UserError
from .history.plan import MemoryPlan
from .media.likeness import common, likeness
from .media.video import read_video
from .models.families import FAMILIES, family_preset
from .models.magi.config import MagiConfig, magi_usual
from .models.magi.memory import magi_frames, plan_magi
from .models.memory import pictures_bytes, pictures_chunks, plan_wan, rolling_history_bytes, wan_frames
from .models.presets import DEFAULT_PRESET, PRESETS
from .models.wan import WanConfig
from .report import megabytes
from .reuse.calibration import QUALITIES
from .settings import HISTORY_RULES, HISTORY_TYPES, bounded_history

DTYPES = {"as it is": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def number_or_name(word: str) -> float | str:
    """A number where it is one, or a name of `QUALITIES`."""
    try:
        return float(word)
    except ValueError:
        return word


def run_demo(options: argparse.Namespace) -> None:
    numbers = compare(options.out, options.caption, options.chunks, options.seed, options.network)
    print(table(numbers))
    print(f"\n{options.out}: videos, side_by_side.webp, report.png, report.json")


def run_info(options: argparse.Namespace) -> None:
    info = checkpoints.inspect(options.file, options.family)
    print(f"family    {info.family}: {checkpoints.FAMILIES[info.family]}")
    config = info.config
    sizes = config.sizes
    print(f"network   width {sizes.dim}, {sizes.layers} blocks, {sizes.heads} heads")
    print(f"layout    {info.layout}" + (f", names begin with {info.prefix}" if info.prefix else ""))
    print(f"weights   {str(info.dtype).removeprefix('torch.')}, {megabytes(info.bytes)}")
    for key, value in info.metadata.items():
        print(f"metadata  {key} = {value}")
    for warning in info.warnings:
        print(f"warning   {warning}")
    if info.family in FAMILIES:
        for line in settings_lines(info.family, config):
            print(line)
        for line in memory_lines(options, info.family, config):
            print(line)


def settings_lines(name: str, config: WanConfig | MagiConfig) -> list[str]:
    """Says what a family is run with where nothing else is asked for, as docs/models.md has it."""
    usual, steps = FAMILIES[name], FAMILIES[name].steps
    lag, (width, height) = usual.lag, usual.size
    if isinstance(config, MagiConfig):
        steps, (width, height) = magi_usual(config)
        lag = steps // 4
    guidance = 1.0 if name == "magi distilled" else usual.guidance
    seen = "" if usual.attention == "causal" else f", attention {usual.attention}"
    return [
        f"settings  {steps} steps, lag {lag}, {usual.chunk_frames} latent frames a chunk, shift {usual.shift:g}, "
        f"guidance {guidance:g}, {usual.solver(steps)}{seen}; {width}x{height}, {usual.fps} fps",
        f"          from {usual.source}",
    ]


def memory_lines(options: argparse.Namespace, name: str, config: WanConfig | MagiConfig) -> list[str]:
    """Says what a video of the asked size and length takes in memory, beside the weights."""
    usual, magi = FAMILIES[name], isinstance(config, MagiConfig)
    width, height = magi_usual(config)[1] if isinstance(config, MagiConfig) else usual.size
    size = (options.width or width, options.height or height)
    if options.seconds <= 0:
        raise UserError(f"seconds is {options.seconds:g}, expected more than 0.")
    asked = round(options.seconds * usual.fps) + (0 if magi else 1)
    frames = magi_frames(asked) if magi else wan_frames(usual, asked)
    video = f"video     {size[0]}x{size[1]}, {frames} frames ({frames / usual.fps:.1f} s)"
    if usual.attention == "rolling" and isinstance(config, WanConfig):
        history = rolling_history_bytes(config, usual, size, asked)
        return [video, f"history   {megabytes(history)} in bfloat16, whatever the length"]
    if usual.attention == "pictures" and isinstance(config, WanConfig):
        chunks, frames = pictures_chunks(usual, asked)
        forward = megabytes(pictures_bytes(config, usual, size))
        return [
            f"video     {size[0]}x{size[1]}, {frames} frames ({frames / usual.fps:.1f} s), {chunks} chunks",
            f"history   none, for a chunk begins with pictures of the one before; forward about {forward}",
        ]
    dim = config.width if isinstance(config, MagiConfig) else config.dim
    settings = family_preset(
        options.preset,
        name,
        dim,
        bounded_history(
            options.budget,
            options.window,
            options.sink,
            rule=options.history_rule,
            relative=options.relative,
            type=options.history_type,
        ),
    )
    if isinstance(config, MagiConfig):
        if options.lag is not None:
            raise UserError("MAGI-1's lag is a quarter of its steps; leave --lag away.")
        plan, all_kept = plan_magi(config, size, asked, settings), "what MAGI-1 looks back on kept"
    else:
        plan, all_kept = plan_wan(config, usual, size, asked, settings, options.lag), "all of it kept"
    kept = f"{options.budget} finished chunks kept" if options.budget else all_kept
    if settings.history.window is not None:
        kept = f"{plan.clean_frames} finished frames kept"
    return [f"{video}, {plan.total_chunks} chunks", *plan_lines(plan, kept)]


def plan_lines(plan: MemoryPlan, kept: str) -> list[str]:
    """Writes a plan of a run's memory in lines."""
    layers, stored = plan.network.layers, "bfloat16" if plan.packing is None else f"int{plan.packing.bits}"
    return [
        f"history   {megabytes(plan.history_bytes)} in {stored}, {kept}; {megabytes(plan.unbounded_bytes)} unbounded",
        f"          {megabytes(plan.stored_bytes // layers)} in each of {layers} layers, scratch "
        f"{megabytes(plan.scratch_bytes)}, queries {megabytes(plan.query_bytes)}",
        f"forward   about {megabytes(plan.activation_bytes)}, texts {megabytes(plan.context_bytes)}",
        f"in all    {megabytes(plan.bytes)} beside the weights",
    ]


def run_convert(options: argparse.Namespace) -> None:
    shown = -1

    def progress(written: int, total: int) -> None:
        nonlocal shown
        if written * 10 // total > shown:
            shown = written * 10 // total
            print(f"writing {written / total:4.0%} of {megabytes(total)}", file=sys.stderr)

    if magi_files.is_vae(options.file):
        magi_files.convert_vae(options.file, options.out, progress)
        print(f"{options.out}: MAGI-1's VAE; put it into ComfyUI's models/vae")
        return
    dtype, use_ema = DTYPES[options.dtype], options.weights == "generator_ema"
    info = checkpoints.convert(
        options.file, options.out, options.family, dtype, use_ema, progress, options.special_tokens, options.lora
    )
    print(f"{options.out}: {info.family}, {megabytes(info.bytes)}; put it into ComfyUI's models/diffusion_models")


def run_compare(options: argparse.Namespace) -> None:
    videos = (torch.from_numpy(read_video(path)).float() / 255 for path in (options.first, options.second))
    print(likeness(*common(*videos)).text())


def parser() -> argparse.ArgumentParser:
    """Makes what reads the command line; each command names the function that runs it."""
    whole = argparse.ArgumentParser(prog="python -m flowcache_core", description="Long autoregressive video, faster.")
    commands = whole.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], None], words: str) -> Callable[..., argparse.Action]:
        """Adds a command, and returns what adds an option to it."""
        part = commands.add_parser(name, help=words)
        part.set_defaults(run=run)
        return part.add_argument

    names = ", ".join(checkpoints.FAMILIES)
    option = command("generate", run_generate, "a video from captions or embeddings, or a longer one from a state")
    option("captions", nargs="*", help='such as "a red circle and a blue square"; several share the chunks evenly')
    option("--out", type=Path, default=Path("out/video.mp4"), help=".mp4, .webp or .gif (default: %(default)s)")
    option("--chunks", type=int, default=16, help="new chunks, of 12 frames each (default: %(default)s)")
    option("--preset", choices=PRESETS, default=DEFAULT_PRESET, help="how much is reused (default: %(default)s)")
    option(
        "--quality",
        type=number_or_name,
        metavar="Q",
        help=f"instead of a preset: 0 to 1, or {', '.join(QUALITIES)}, as calibrated (1: every step is recomputed)",
    )
    option("--budget", type=int, metavar="CHUNKS", help="clean chunks that are kept in the history (default: all)")
    option("--window", type=int, metavar="FRAMES", help="instead: latent frames that a chunk sees, its own included")
    option("--sink", type=int, default=0, metavar="FRAMES", help="of them, those of the beginning that always stay")
    option(
        "--relative",
        action="store_true",
        help="positions count from the start of the history (needs --budget or --window)",
    )
    option("--history-rule", choices=HISTORY_RULES, default=HISTORY_RULES[0], help="what stays (default: %(default)s)")
    option("--history-type", choices=HISTORY_TYPES, default=HISTORY_TYPES[0], help="how finished chunks are stored")
    option("--seed", type=int, default=0)
    option("--steps", type=int, help="denoising steps of a chunk (default: the family's)")
    option("--lag", type=int, help="steps that a chunk is ahead of the next (default: the family's)")
    option("--guidance", type=float, help="classifier-free guidance; 1 is off (default: the family's)")
    option("--negative", default="", metavar="CAPTION", help="what to keep away from, with guidance")
    option("--state", type=Path, metavar="FILE", help="go on from this state of an earlier run")
    option(
        "--prefix", type=Path, metavar="LATENTS", help="go on from these, an image or a video, of Save Latent or --out"
    )
    option("--video", type=Path, metavar="LATENTS", help="start from this video's latents, of Save Latent or --out")
    option(
        "--strength",
        type=float,
        default=STRENGTH,
        metavar="S",
        help="with --video: share of the steps that are taken from there, above 0 to 1 (default: %(default)g)",
    )
    option("--save-state", type=Path, metavar="FILE", help="write the state, to go on from later (.safetensors)")
    option("--report", type=Path, metavar="FILE", help="write what the run did: .json, or a picture .png")
    sizes = range(1, 17)
    option("--enlarge", type=int, default=4, choices=sizes, metavar="TIMES", help="pixel size (default: %(default)s)")
    option("--network", type=Path, metavar="FILE", help="the network; of the family demo one is there")
    option(
        "--network-low",
        type=Path,
        metavar="FILE",
        help="of the family experts: the network for low noise levels, where --network is no folder of both",
    )
    option("--family", help=f"demo, auto or {names} (default: demo for captions, what the file says for --text)")
    option(
        "--text", type=Path, nargs="+", metavar="EMBEDDING", help="instead of captions: files of Save Text Embedding"
    )
    option("--shots", type=int, nargs="+", default=[], metavar="CHUNK", help="that begin a new shot (LongLive 2.0)")
    option("--negative-text", type=Path, metavar="EMBEDDING", help="the same of what to keep away from, with guidance")
    option("--width", type=int, help="in pixels, but for the demo model (default: the family's)")
    option("--height", type=int, help="likewise")
    option("--dtype", choices=DTYPES, default="as it is", help="to compute in, but for the demo model")
    option("--device", choices=("cpu", "cuda"), help="that computes (default: cpu; with torchrun cuda where it can)")
    option("--resume", type=Path, metavar="FOLDER", help="keep finished chunks there, and go on from those of this run")
    option(
        "--resume-gb",
        type=float,
        default=20.0,
        metavar="GB",
        help="that runs there may take (default: %(default)g)",
    )
    option("--stream", type=Path, metavar="FILE", help="an .mp4 that grows while the demo model runs")
    option("--scheme", choices=("ulysses", "pipeline"), default="ulysses", help="of several processes (torchrun)")
    option("--shard", action="store_true", help="with torchrun and ulysses: each process holds a part of the weights")

    option = command("demo", run_demo, "the same video plain, with FlowCache, and with a short history; compared")
    option("--out", type=Path, default=Path("out/demo"), help="folder (default: %(default)s)")
    option("--caption", default=CAPTION, help="(default: %(default)s)")
    option("--chunks", type=int, default=16, help="(default: %(default)s)")
    option("--seed", type=int, default=0)
    option("--network", type=Path, metavar="FILE", help="another network of the demo's family")

    option = command("info", run_info, "what a checkpoint is, and what memory its videos take")
    option("file", type=Path)
    option("--family", default="auto", help=f"auto or {names}")
    option("--width", type=int, help="of a video, for the memory of its history (default: the model's own)")
    option("--height", type=int, help="likewise")
    option("--seconds", type=float, default=5.0, help="likewise (default: %(default)g)")
    option("--budget", type=int, metavar="CHUNKS", help="clean chunks that are kept (default: all)")
    option("--window", type=int, metavar="FRAMES", help="as for generate")
    option("--sink", type=int, default=0, metavar="FRAMES", help="as for generate")
    option("--relative", action="store_true", help="as for generate")
    option("--history-rule", choices=HISTORY_RULES, default=HISTORY_RULES[0], help="as for generate")
    option("--history-type", choices=HISTORY_TYPES, default=HISTORY_TYPES[0], help="as for generate")
    option("--lag", type=int, help="steps that a chunk is ahead of the next (default: the model's own)")
    option("--preset", choices=PRESETS, default=DEFAULT_PRESET, help="(default: %(default)s)")

    option = command("batch", run_batch, "many videos: a workflow for each line of a file, by workers on Ray")
    option("jobs", type=Path, help="a file with one JSON object a line: values of the workflow's inputs by name")
    option("--workflow", type=Path, required=True, metavar="FILE", help="in the API's form, as in workflows/api/")
    option("--out", type=Path, default=Path("out/batch"), help="folder of the results (default: %(default)s)")
    option("--ray", metavar="ADDRESS", help="of a Ray cluster, or auto (default: Ray is started here)")
    option("--workers", type=int, help="ComfyUIs (default: one for each GPU)")
    option("--threads", type=int, default=0, help="of each of them, where they compute on processors (default: all)")
    option("--comfyui", type=Path, default=default_host(), help="its folder, on every machine (default: %(default)s)")
    option("--models", type=Path, metavar="FOLDER", help="of models (default: ComfyUI's own)")
    option("--runs", type=Path, metavar="FOLDER", help="of runs to go on from; all machines see it (default: in --out)")
    option("--host-argument", action="append", default=[], metavar="WORD", help="for ComfyUI, as --host-argument=--cpu")
    option("--heartbeat", type=float, default=60.0, help="seconds in which ComfyUI must answer (default: %(default)g)")

    option = command("compare", run_compare, "how alike two video files are, frame by frame")
    option("first", type=Path)
    option("second", type=Path)

    option = command("convert", run_convert, "a checkpoint (or MAGI-1's VAE) of any layout to one file for ComfyUI")
    option("file", type=Path)
    option("out", type=Path)
    option("--family", default="auto", help=f"auto or {names}")
    option("--dtype", choices=DTYPES, default="as it is", help="of the matrices (default: %(default)s)")
    option(
        "--weights",
        choices=("generator_ema", "generator"),
        default="generator_ema",
        help="of a .pt file that has both: averaged over training, or its last ones (default: %(default)s)",
    )
    option("--lora", type=Path, metavar="FILE", help="a LoRA of a network of the Wan layout, to be merged into it")
    option("--special-tokens", type=Path, metavar="FILE", help="MAGI-1's special_tokens.npz, to be put into the file")
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for a mistake of input, 130 when interrupted."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Cancelled):
        print("\nCancelled.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
