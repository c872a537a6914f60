"""The paper's rows on your GPU and weights.

`python -m flowcache_core.lab.paper skyreels --model FILE --text FILE --vae FILE` drives a running ComfyUI in which this
pack is installed, with the paper's settings: SkyReels-V2 1.3B at 544 x 960, 50 steps, a chunk of 5 frames every 5
ticks, guidance 6, 177 frames in two windows of 97 which share 17, encoded anew and shown at noise level 0.02; MAGI-1
4.5B-distill with 64 steps, 4 chunks at once. The paper took VBench's prompts: give them as a file,
one a line. Each row is compared, frame by frame, with the unaccelerated run of the same prompt and seed. The paper's
own figures (one A800) stand beside. `demo` does the same with the model that ships.

TeaCache's rows: on MAGI-1 the threshold 0.01 is published, 0.015 is FlowCache's for its fast row; the paper names none
for SkyReels-V2, so these are the model's makers' (0.2, and 0.3 in their examples). The rule runs over the history
here, as FlowCache does, where upstream's recomputes the whole window.

Source of the figures and settings: arXiv 2602.10825, tables of results and appendix; FlowCache's run scripts;
SkyReels-V2's generate_video_df.py and README.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..media.metrics import psnr, ssim
from ..models.memory import FRAME_STRIDE
from ..storage.files import check_writable, write_whole
from .comfy import ComfyUI, Graph


@dataclass(frozen=True)
class Row:
    """One way of running a model.

    Attributes:
        name: as the table calls it.
        preset: of the FlowCache node, or None to run without it.
        attention: of Autoregressive Extend.
        threshold: of TeaCache's rule, where the preset is "custom".
        published: speedup, SSIM and PSNR as the paper has them, or None.
    """

    name: str
    preset: str | None
    attention: str = "auto"
    threshold: float | None = None
    published: tuple[float, float, float] | None = None


def teacache(threshold: float, speed: str, published: tuple[float, float, float] | None = None) -> Row:
    return Row(f"TeaCache {speed} ({threshold:g})", "custom", threshold=threshold, published=published)


TEACACHE = {"warmup": 5, "forecast": "hold", "correct": False}  # of the FlowCache node
OURS = (Row("ours, high", "high"), Row("ours, balanced", "balanced"), Row("ours, fast", "fast"))


@dataclass(frozen=True)
class Model:
    """A family as the paper ran it; 0 and -1 are what Autoregressive Extend recommends for it.

    Attributes:
        text_type: of CLIPLoader, or None where captions need no encoder.
        vae, prompt: nodes that load the VAE and that encode a prompt.
        windows: chunks that each generates.
        overlap: pixel frames that a window takes over from the one before.
        condition: noise level that they are shown at.
        steps, guidance, frames, lag, width, height: of Autoregressive Extend.
        negative: prompt of the unconditional branch.
        rows: the unaccelerated run first.
    """

    family: str
    text_type: str | None
    vae: str
    prompt: str
    rows: tuple[Row, ...]
    windows: tuple[int, ...]
    overlap: int = 0
    condition: float = -1.0
    steps: int = 0
    guidance: float = 0.0
    frames: int = 0
    lag: int = -1
    width: int = 0
    height: int = 0
    prompts: tuple[str, ...] = field(default=("In a still frame, a stop sign",))


MODELS = {
    "skyreels": Model(
        "skyreels", "wan", "VAELoader", "CLIPTextEncode",
        (
            Row("vanilla", None, "joint"),
            Row("history only", "off"),
            teacache(0.2, "slow", (1.89, 0.7501, 21.96)),
            teacache(0.3, "fast", (2.20, 0.6121, 18.39)),
            Row("FlowCache slow", "paper slow", published=(5.88, 0.7890, 23.74)),
            Row("FlowCache fast", "paper fast", published=(6.70, 0.7635, 22.95)),
            *OURS,
        ),
        windows=(5, 4), overlap=17, condition=0.02,
        steps=50, guidance=6.0, frames=5, lag=5, width=960, height=544,
    ),
    "magi": Model(
        "magi distilled", "mochi", "FlowCacheLoadMagiVAE", "FlowCacheMagiPrompt",
        (
            Row("vanilla", None),
            teacache(0.01, "slow", (1.12, 0.2801, 13.26)),
            teacache(0.015, "fast", (1.44, 0.1138, 8.94)),
            Row("FlowCache slow", "paper slow", published=(1.86, 0.6497, 22.34)),
            Row("FlowCache fast", "paper fast", published=(2.38, 0.5140, 19.27)),
            *OURS,
        ),
        windows=(10,), steps=64,
    ),
    "demo": Model(
        "auto", None, "FlowCacheLoadDemoVAE", "FlowCacheDemoPrompt",
        (
            Row("vanilla", None),
            teacache(0.1, "slow"),
            teacache(0.2, "fast"),
            Row("FlowCache slow", "paper slow"),
            Row("FlowCache fast", "paper fast"),
            *OURS,
        ),
        windows=(4, 3), overlap=9, condition=0.0, frames=3, prompts=("a red circle and a blue square",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """Of ComfyUI's model folders: the network, its text encoder and its VAE."""

    model: str = "demo model (ships with FlowCache)"
    text: str = ""
    vae: str = ""


@dataclass
class Measured:
    """A row's figures, one entry a prompt: seconds of the run, SSIM and PSNR to the unaccelerated run."""

    row: Row
    seconds: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A graph of one row; the nodes of pictures and of reports, a window each."""

    graph: Graph
    pictures: list[str]
    reports: list[str]


def run_of(model: Model, files: Files, row: Row, prompt: str, seed: int, windows: Sequence[int]) -> Run:
    """One row on one prompt, in windows of so many generated chunks."""
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name=files.model, family=model.family, weight_type="default"
    )  # fmt: skip
    vae = graph.add(model.vae, **({"vae_name": files.vae} if files.vae else {}))
    if model.text_type is None:
        words = [graph.add(model.prompt, caption=caption) for caption in (prompt, "")]
    else:
        clip = graph.add("CLIPLoader", clip_name=files.text, type=model.text_type, device="default")
        words = [graph.add(model.prompt, clip=(clip, 0), text=text) for text in (prompt, "")]
    if row.preset is not None:
        rule = {} if row.threshold is None else {"policy": "teacache", "threshold": row.threshold} | TEACACHE
        loaded = graph.add("FlowCache", model=(loaded, 0), preset=row.preset, history_budget=0, **rule)
    run = Run(graph, [], [])
    given: dict = {}
    for number, chunks in enumerate(windows):
        made = graph.add(
            "FlowCacheAutoregressiveExtend",
            model=(loaded, 0), positive=(words[0], 0), negative=(words[1], 0), seed=seed + number, chunks=chunks,
            steps=model.steps, guidance=model.guidance, frames_per_chunk=model.frames, lag=model.lag,
            width=model.width, height=model.height, attention=row.attention, **given,
        )  # fmt: skip
        pixels = graph.add("VAEDecode", samples=(made, 0), vae=(vae, 0))
        run.pictures.append(graph.add("PreviewImage", images=(pixels, 0)))
        run.reports.append(graph.add("FlowCacheReport", report=(made, 2)))
        if number + 1 < len(windows):
            begin = frames_of(model, chunks, number > 0) - model.overlap
            last = graph.add("ImageFromBatch", image=(pixels, 0), batch_index=begin, length=model.overlap)
            start = graph.add("VAEEncode", pixels=(last, 0), vae=(vae, 0))
            given = {"prefix": (start, 0), "condition_noise": model.condition}
    return run


def frames_of(model: Model, chunks: int, given: bool) -> int:
    """Pixel frames of a window that generates so many chunks, those taken over included: four a latent frame, the
    first one has one."""
    new = FRAME_STRIDE * model.frames * chunks
    return new + model.overlap if given else new - (FRAME_STRIDE - 1)


def measure(
    host: ComfyUI, model: Model, files: Files, prompts: list[str], seed: int, windows: Sequence[int]
) -> list[Measured]:
    """Runs every row on every prompt; a short run before them loads the model and is not counted."""
    host.run(run_of(model, files, model.rows[0], prompts[0], seed + 1, (1,)).graph)
    measured = [Measured(row) for row in model.rows]
    for prompt in prompts:
        wanted = None
        for one in measured:
            run = run_of(model, files, one.row, prompt, seed, windows)
            outputs = host.run(run.graph)
            one.seconds.append(sum(seconds_of(outputs[report]["text"][0]) for report in run.reports))
            parts = [_pixels(host.pictures(outputs, pictures)) for pictures in run.pictures]
            shown = torch.cat([parts[0], *(part[:, model.overlap :] for part in parts[1:])], dim=1)
            if wanted is None:
                wanted = shown
                continue
            one.ssim.append(ssim(shown, wanted))
            one.psnr.append(min(psnr(shown, wanted), 100.0))
            print(f"{one.row.name}: {one.seconds[-1]:.1f} s, {one.psnr[-1]:.2f} dB", file=sys.stderr, flush=True)
    return measured


def seconds_of(report: str) -> float:
    """The time of a run, from the text of FlowCache Report."""
    found = re.search(r"time: ([\d.]+) s", report)
    if not found:
        raise UserError(f"The report names no time: {report[:80]!r}; use the nodes of this version.")
    return float(found[1])


def table(measured: list[Measured]) -> str:
    """Markdown: a row a method, with the paper's figures beside."""
    first = float(np.mean(measured[0].seconds))
    lines = ["| method | seconds | speedup | SSIM | PSNR | paper: speedup | SSIM | PSNR |", "| --- " * 8 + "|"]
    for one in measured:
        seconds = float(np.mean(one.seconds))
        alike = (f"{np.mean(one.ssim):.4f}", f"{np.mean(one.psnr):.2f}") if one.psnr else ("", "")
        paper = one.row.published
        told = (f"{paper[0]:.2f}x", f"{paper[1]:.4f}", f"{paper[2]:.2f}") if paper else ("", "", "")
        cells = [one.row.name, f"{seconds:.1f}", f"{first / seconds:.2f}x", *alike, *told]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pixels(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to [3, T, H, W] in [0, 1]."""
    return torch.from_numpy(frames).movedim(-1, 0).float() / 255.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=list(MODELS))
    parser.add_argument("--model", default=Files.model, help="file of ComfyUI's diffusion_models")
    parser.add_argument("--text", default="", help="file of its text_encoders: umt5 XXL (SkyReels), T5 v1.1 XXL (MAGI)")
    parser.add_argument("--vae", default="", help="file of its vae folder")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one a line, as VBench's")
    parser.add_argument("--chunks", type=int, help="of each window (default: as in the paper)")
    parser.add_argument("--seed", type=int, default=1024)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/paper.md"), help="the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    model = MODELS[options.family]
    try:
        check_writable(options.out)
        prompts = options.prompts.read_text().split("\n") if options.prompts else list(model.prompts)
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
        if not prompts:
            raise UserError(f"{options.prompts} holds no prompt; write one a line.")
        files = Files(options.model, options.text, options.vae)
        windows = [options.chunks or chunks for chunks in model.windows]
        measured = measure(ComfyUI(options.server), model, files, prompts, options.seed, windows)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = table(measured)
    write_whole(options.out, lambda partial: partial.write_text(words + "\n"))
    print(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
