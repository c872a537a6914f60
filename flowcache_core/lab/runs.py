"""One method on one set of clips, all clips in one batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo.captions import embed_caption
from ..demo.evaluate import captions
from ..demo.train_network import FRAMES_PER_CHUNK
from ..engine.joint import JointEngine, JointGuidance
from ..engine.loop import Engine, guidance
from ..engine.runner import Runner
from ..models.presets import OFF, Settings
from ..models.wan import Attention, WanBackbone
from ..report import Report
from ..schedule import ChunkSchedule
from ..solvers.one_step import SolverFactory, chunk_noise
from .setups import Setup

LATENT = (8, 8)  # height and width


@dataclass(frozen=True)
class Method:
    """What is measured, with one setting of it.

    Attributes:
        name: of the curve that it is a point of.
        setting: what differs along the curve, in a few words.
        settings: of FlowCache.
        steps: fewer (or more) than the setup's, or None for as many.
        solver: another than the setup's, or None.
        runner: another class that decides on reuse, or FlowCache's.
        window: every frame of the window in every forward, and no history.
        timed: also run in alternation with the plain run, for its time.
    """

    name: str
    setting: str = ""
    settings: Settings = OFF
    steps: int | None = None
    solver: SolverFactory | None = None
    runner: type[Runner] = Runner
    window: bool = False
    timed: bool = False


@dataclass(frozen=True)
class Clips:
    """What is generated: captions, noise and length.

    Attributes:
        backbone: the network.
        captions: one a clip.
        chunks: of every clip.
        seed: of the noise. A clip's noise depends on its place in the list of captions.
    """

    backbone: WanBackbone
    captions: list[str]
    chunks: int
    seed: int = 5

    @classmethod
    def held_out(cls, backbone: WanBackbone, clips: int, chunks: int, seed: int = 5) -> "Clips":
        """Captions that depend on the seed alone; training draws its own."""
        return cls(backbone, captions(clips, seed + 900), chunks, seed)

    @property
    def text(self) -> Tensor:
        return torch.cat([embed_caption(caption) for caption in self.captions])

    def noise(self, chunk: int, *step: int) -> Tensor:
        """[clips, 16, T, h, w], fresh for a step where one is given."""
        shape = (1, self.backbone.channels, FRAMES_PER_CHUNK, *LATENT)
        rows = [chunk_noise(self.seed + 7919 * row, chunk, shape, *step) for row in range(len(self.captions))]
        return torch.cat(rows)


@dataclass
class Outcome:
    """What came out.

    Attributes:
        latents: [clips, 16, T, h, w].
        report: of the run.
        seconds: wall time, from the first tick to the last.
        forwards: of one clip, over one chunk each.
        history_bytes: of one clip, at the peak.
        chunk_seconds: when each chunk was handed out, since the run began.
    """

    latents: Tensor
    report: Report
    seconds: float
    forwards: int
    history_bytes: int
    chunk_seconds: list[float] = field(default_factory=list)


def run(
    method: Method,
    setup: Setup,
    clips: Clips,
    on_chunk: Callable[[int, Runner | None], None] = lambda chunk, runner: None,
) -> Outcome:
    """Runs a method on clips; `on_chunk` is told of each finished chunk."""
    steps = method.steps or setup.steps
    schedule = ChunkSchedule(clips.chunks, steps, setup.lag_of(steps))
    levels, solver = setup.levels(steps), method.solver or setup.solver
    if method.window:
        runner: Runner | None = None
        denoise = JointGuidance(
            clips.backbone, {"cond": clips.text}, {"cond": 1.0}, block_causal(chunk_tokens(clips.backbone))
        )
        window = JointEngine(schedule, denoise, levels, clips.noise, clips.noise, solver)
        engine: JointEngine | Engine = window
        report = window.report
    else:
        runner = method.runner(clips.backbone, schedule, method.settings, FRAMES_PER_CHUNK)
        engine = Engine(runner, guidance(runner, clips.text), levels, clips.noise, clips.noise, solver)
        report = runner.report
    latents, marks = [], []
    begun = time.perf_counter()
    for chunk in engine.run():
        latents.append(chunk.latent)
        marks.append(time.perf_counter() - begun)
        on_chunk(chunk.index, runner)
    seconds = time.perf_counter() - begun
    forwards = schedule.ticks * schedule.chunks if method.window else report.forwards_executed
    peak = report.history_bytes_peak // len(clips.captions)
    return Outcome(torch.cat(latents, dim=2), report, seconds, forwards, peak, marks)


def plain_forwards(setup: Setup, chunks: int) -> int:
    """Forwards over one chunk that the unaccelerated run of a setup takes."""
    schedule = ChunkSchedule(chunks, setup.steps, setup.lag)
    return schedule.ticks * chunks if setup.window else chunks * (setup.steps + 1)


def block_causal(tokens: int) -> Attention:
    """Attention of a window in which every chunk of so many tokens sees itself and those before it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(part, k[:, :, : end + part.shape[2]], v[:, :, : end + part.shape[2]])
            for end, part in zip(range(0, q.shape[2], tokens), q.split(tokens, dim=2), strict=True)
        ]
        return torch.cat(parts, dim=2)

    return attention


def chunk_tokens(backbone: WanBackbone) -> int:
    """Tokens of a chunk."""
    rows, columns = backbone.grid(*LATENT)
    return rows * columns * FRAMES_PER_CHUNK
