"""One method on one set of clips, all clips in one batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo import embed_caption
from ..demo.evaluate import captions
from ..demo.train_network import FRAMES_PER_CHUNK
from ..engine.build import RunSettings, build_engine
from ..engine.guidance import classifier_free
from ..engine.loop import Engine, Sampling
from ..models.wan import Attention, WanBackbone
from ..report import Report
from ..schedule import ChunkSchedule
from ..settings import OFF, Settings
from ..solvers.one_step import START, SolverFactory, chunk_noise
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
        build: makes the run, from its settings and from what makes a causal run's forward.
        window: every frame of the window in every forward, and no history.
        timed: also run in alternation with the plain run, for its time.
    """

    name: str
    setting: str = ""
    settings: Settings = OFF
    steps: int | None = None
    solver: SolverFactory | None = None
    build: Callable[..., Engine] = build_engine
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a chunk of all clips."""
        return (len(self.captions), self.backbone.channels, FRAMES_PER_CHUNK, *LATENT)

    def noise(self, chunk: int, step: int = START) -> Tensor:
        """Draws [clips, 16, T, h, w], fresh for a step where one is given."""
        shape = (1, *self.shape[1:])
        rows = [chunk_noise(self.seed + 7919 * row, chunk, shape, step) for row in range(len(self.captions))]
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
    """

    latents: Tensor
    report: Report
    seconds: float
    forwards: int
    history_bytes: int


def run(method: Method, setup: Setup, clips: Clips, watch: Callable[[Engine], None] = lambda engine: None) -> Outcome:
    """Runs a method on clips, until it could go on; `watch` gets the run before it begins."""
    engine = engine_of(method, setup, clips)
    watch(engine)
    begun = time.perf_counter()
    latents = [chunk.latent for chunk in engine.run()]
    engine.save()  # ready to go on from, with the last chunk's clean pass
    seconds = time.perf_counter() - begun
    report, schedule = engine.report, engine.schedule
    forwards = schedule.ticks * schedule.chunks if method.window else report.forwards_executed
    if (work := getattr(engine.forward, "work", None)) is not None:  # parts of forwards, in all clips alike
        forwards = round(work)
    peak = report.history_bytes_peak // len(clips.captions)
    return Outcome(torch.cat(latents, dim=2), report, seconds, forwards, peak)


def engine_of(method: Method, setup: Setup, clips: Clips) -> Engine:
    """Makes a run of a method on clips."""
    return method.build(run_settings(method, setup, clips))


def run_settings(method: Method, setup: Setup, clips: Clips) -> RunSettings:
    """What a run of a method on clips is put together from."""
    steps, attention = method.steps or setup.steps, F.scaled_dot_product_attention
    return RunSettings(
        clips.backbone,
        classifier_free(clips.text),
        ChunkSchedule(clips.chunks, steps, setup.lag_of(steps)),
        method.settings,
        Sampling(setup.levels(steps), clips.noise, clips.noise, method.solver or setup.solver),
        "joint" if method.window else "causal",
        clips.shape,
        branches=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=block_causal(chunk_tokens(clips.backbone)) if method.window else attention,
    )


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
