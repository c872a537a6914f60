"""The paper's rows as graphs of a ComfyUI.

SkyReels-V2 1.3B at 544 x 960: 50 steps, a chunk of 5 frames every 5 ticks, guidance 6, 177 frames in two windows of 97
which share 17, encoded anew and shown at noise level 0.02. MAGI-1 4.5B-distill: 64 steps, 4 chunks at once. `demo` does
the same with the model that ships.

TeaCache's rows: on MAGI-1 the threshold 0.01 is published, 0.015 is FlowCache's for its fast row; the paper names none
for SkyReels-V2, so these are the model's makers' (0.2, and 0.3 in their examples). The rule runs over the history
here, as FlowCache does, where upstream's recomputes the whole window.

Compression: a budget of 1 clean chunk for SkyReels-V2, of 2 for MAGI-1, whose 6 chunks in all are 4 active ones and 2.

Source of the figures and settings: arXiv 2602.10825, tables of results and appendix; FlowCache's run scripts
(yaml_config/sample/flowcache_vbench.yaml, run_flowcache_kvcompress.sh); SkyReels-V2's generate_video_df.py and README.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..demo.captions import TOKENS
from ..demo.train_network import CONFIG as DEMO
from ..models.magi.config import MAGI_4_5B, MagiConfig
from ..models.wan import FRAME_STRIDE, WanConfig
from .comfy import Graph
from .real_size import WAN_1_3B


@dataclass(frozen=True)
class Published:
    """The paper's figures of a row, on one A800; None where it has none."""

    pflops: float | None = None
    speedup: float | None = None
    vbench: float | None = None
    lpips: float | None = None
    ssim: float | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class Row:
    """One way of running a model.

    Attributes:
        name: as the table calls it.
        preset: of the FlowCache node, or None to run without it.
        attention: of Autoregressive Extend.
        threshold: of TeaCache's rule, where the preset is "custom".
        budget: clean chunks that are kept, 0 for all of them.
        published: what the paper has of it.
    """

    name: str
    preset: str | None
    attention: str = "auto"
    threshold: float | None = None
    budget: int = 0
    published: Published = Published()


def teacache(threshold: float, speed: str, published: Published = Published()) -> Row:
    """TeaCache's rule at a threshold."""
    return Row(f"TeaCache {speed} ({threshold:g})", "custom", threshold=threshold, published=published)


def compressed(budget: int) -> tuple[Row, ...]:
    """The published rule with its compression."""
    speeds = ("slow", "fast")
    return tuple(Row(f"FlowCache {speed}, budget {budget}", f"paper {speed}", budget=budget) for speed in speeds)


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
        config: of the network, which operations are counted for.
        text_tokens: of a caption, for the same.
        fps: of its videos.
        negative: prompt of the unconditional branch.
        rows: the unaccelerated run first.
    """

    family: str
    text_type: str | None
    vae: str
    prompt: str
    config: WanConfig | MagiConfig
    text_tokens: int
    fps: int
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
        "skyreels", "wan", "VAELoader", "CLIPTextEncode", WAN_1_3B, 512, 24,
        (
            Row("vanilla", None, "joint", published=Published(113, 1.0, 83.84)),
            Row("history only", "off"),
            teacache(0.2, "slow", Published(58, 1.89, 82.67, 0.1472, 0.7501, 21.96)),
            teacache(0.3, "fast", Published(49, 2.20, 80.06, 0.3063, 0.6121, 18.39)),
            Row("FlowCache slow", "paper slow", published=Published(36, 5.88, 83.12, 0.1225, 0.7890, 23.74)),
            Row("FlowCache fast", "paper fast", published=Published(28, 6.70, 83.05, 0.1467, 0.7635, 22.95)),
            *compressed(1),
            *OURS,
        ),
        windows=(5, 4), overlap=17, condition=0.02,
        steps=50, guidance=6.0, frames=5, lag=5, width=960, height=544,
    ),
    "magi": Model(
        "magi distilled", "mochi", "FlowCacheLoadMagiVAE", "FlowCacheMagiPrompt", MAGI_4_5B, 800, 24,
        (
            Row("vanilla", None, published=Published(306, 1.0, 77.06)),
            teacache(0.01, "slow", Published(294, 1.12, 77.50, 0.6211, 0.2801, 13.26)),
            teacache(0.015, "fast", Published(225, 1.44, 70.11, 0.8160, 0.1138, 8.94)),
            Row("FlowCache slow", "paper slow", published=Published(161, 1.86, 78.96, 0.3160, 0.6497, 22.34)),
            Row("FlowCache fast", "paper fast", published=Published(140, 2.38, 77.93, 0.4311, 0.5140, 19.27)),
            *compressed(2),
            *OURS,
        ),
        windows=(10,), steps=64,
    ),
    "demo": Model(
        "auto", None, "FlowCacheLoadDemoVAE", "FlowCacheDemoPrompt", DEMO, TOKENS, 16,
        (
            Row("vanilla", None),
            teacache(0.1, "slow"),
            teacache(0.2, "fast"),
            Row("FlowCache slow", "paper slow"),
            Row("FlowCache fast", "paper fast"),
            *compressed(2),
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
        loaded = graph.add("FlowCache", model=(loaded, 0), preset=row.preset, history_budget=row.budget, **rule)
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
