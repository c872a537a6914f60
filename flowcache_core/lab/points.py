"""One setting of one method, measured: cost, likeness to the plain and to the converged run, quality by itself."""

from dataclasses import asdict, dataclass

from torch import Tensor

from ..demo.captions import TOKENS
from ..demo.train_network import FRAMES_PER_CHUNK
from ..schedule import ChunkSchedule
from . import flops as counted
from .likeness import Spread, decibels, likeness, pixels, quality
from .looks import Looks, Seen
from .methods import PLAIN
from .process import resident
from .runs import Clips, Method, Outcome, chunk_tokens
from .setups import Setup
from .teacher import Teacher, can_be_taught, taught


@dataclass
class Point:
    """Means over the clips, unless said otherwise; costs are of one clip.

    Attributes:
        schedule, method, setting: what was run.
        speedup: wall time of the plain run over this one's.
        timed: "pairs" where runs of one clip alternated with plain ones, "batch" where the run of all clips was timed.
        free: PSNR of every clip to the plain run, dB; None for itself.
        forced: the same of the teacher-forced run, see `teacher`; None where there is none.
        ssim: to the plain run; None for itself.
        psnr_vae: of the first clip, by the VAE's decoder, which takes long; None where it was not measured.
        looks: beside the plain run.
        psnr_converged: to the converged run, over as many clips and chunks as that has; None where there is none.
        detector, detector_first, detector_last: share of frames with the captioned shapes; of the first and last chunk.
        growth: area of the shapes, last quarter over first.
        jerk: change of velocity from frame to frame, pixels.
        forwards_executed, forwards_total: over one chunk each; the plain run's.
        flops: counted by formula.
        seconds: of the run of all clips.
        history_bytes_peak, rss_bytes: of the history, of the process after the run.
        overhead: share of the run's time outside the network, of one clip where "pairs", of the batch else.
    """

    schedule: str
    method: str
    setting: str
    speedup: float
    timed: str
    free: Spread | None
    forced: Spread | None
    ssim: float | None
    psnr_vae: float | None
    looks: Looks
    psnr_converged: float | None
    detector: float
    detector_first: float
    detector_last: float
    growth: float
    jerk: float
    forwards_executed: int
    forwards_total: int
    flops: int
    seconds: float
    history_bytes_peak: int
    rss_bytes: int
    overhead: float

    @property
    def psnr(self) -> float | None:
        return self.free.mean if self.free else None

    def as_dict(self) -> dict:
        told = asdict(self) | _told("psnr", self.free) | _told("forced", self.forced) | {"looks": self.looks.as_dict()}
        del told["free"]
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in told.items()}


def _told(name: str, spread: Spread | None) -> dict:
    """Mean under the name itself, then median, standard error and every clip; all None where there is no spread."""
    told = spread.as_dict() if spread else dict.fromkeys(("mean", "median", "error", "clips"))
    return {name: told.pop("mean")} | {f"{name}_{word}": value for word, value in told.items()}


@dataclass
class References:
    """What runs are compared with.

    Attributes:
        plain: how it looks.
        teacher: the same run, step by step.
        converged: the converged run's, of the first of the clips and frames; None where there is none.
        forwards, seconds: of the plain run.
        half_seconds: about what a run of half of the steps takes.
    """

    plain: Seen
    teacher: Teacher
    converged: Tensor | None
    forwards: int
    seconds: float
    half_seconds: float


def measure(method: Method, setup: Setup, clips: Clips, outcome: Outcome, references: References) -> Point:
    """A point from a finished free run; `speedup` is that of the batch until runs in alternation say better."""
    itself = method.name == PLAIN
    shown = references.plain.pixels if itself else pixels(outcome.latents)
    plain = None if itself else likeness(shown, references.plain.pixels)
    converged = None
    if references.converged is not None:
        clips_seen, _, frames, *_ = references.converged.shape
        converged = decibels(shown[:clips_seen, :, :frames], references.converged).mean
    good = quality(shown, clips.captions)
    return Point(
        schedule=setup.name,
        method=method.name,
        setting=method.setting,
        speedup=references.seconds / outcome.seconds,
        timed="batch",
        free=None if plain is None else plain.spread,
        forced=None,
        ssim=None if plain is None else plain.ssim,
        psnr_vae=None,
        looks=references.plain.looks(shown),
        psnr_converged=converged,
        detector=good.detector,
        detector_first=good.detector_first,
        detector_last=good.detector_last,
        growth=good.growth,
        jerk=good.jerk,
        forwards_executed=outcome.forwards,
        forwards_total=references.forwards,
        flops=flops(method, clips, outcome),
        seconds=outcome.seconds,
        history_bytes_peak=outcome.history_bytes,
        rss_bytes=resident(),
        overhead=outcome.report.overhead,
    )


def forced(method: Method, setup: Setup, clips: Clips, references: References) -> Spread | None:
    """Measures a method teacher-forced; None where the plain run cannot teach it."""
    if not can_be_taught(method, setup):
        return None
    return decibels(pixels(taught(method, setup, clips, references.teacher)), references.plain.pixels)


def flops(method: Method, clips: Clips, outcome: Outcome) -> int:
    """Counts those of one clip's run."""
    tokens = chunk_tokens(clips.backbone)
    return counted.run_flops(clips.backbone, outcome.report, tokens, TOKENS, method.settings.clean_pass)


def window_flops(setup: Setup, clips: Clips) -> int:
    """Of one clip's plain run where every frame of the window is recomputed at every tick."""
    ticks, tokens = ChunkSchedule(clips.chunks, setup.steps, setup.lag).ticks, chunk_tokens(clips.backbone)
    return counted.window_flops(clips.backbone, ticks, clips.chunks, tokens, FRAMES_PER_CHUNK, TOKENS)
