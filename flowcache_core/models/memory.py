"""How much memory the history of a run takes, from the sizes of the network and of the video alone."""

from dataclasses import dataclass, replace

from ..engine.rolling import rolling_bytes
from ..history.settings import HistorySettings, HistoryShape
from ..schedule import ChunkSchedule
from .families import Family, magi_usual
from .magi.config import MagiConfig
from .magi.engine import MagiSampling, history_plan, magi_schedule
from .magi.sampling import CHUNK_FRAMES
from .presets import OFF
from .wan import WanConfig

VAE_STRIDE = 8  # pixels of a latent pixel, across and down
FRAME_STRIDE = 4  # pixel frames of a latent frame; a video's first one has 1


@dataclass(frozen=True)
class HistoryPlan:
    """Bytes of history of a run.

    Attributes:
        chunks: of the video.
        frames: pixel frames of the video, in whole chunks.
        planned: what the run allocates.
        unbounded: the same without a budget.
    """

    chunks: int
    frames: int
    planned: int
    unbounded: int


def plan_history(
    config: WanConfig,
    family: Family,
    size: tuple[int, int],
    frames: int,
    history: HistorySettings = HistorySettings(),
    itemsize: int = 2,
) -> HistoryPlan:
    """The plan of a run with a family's recommended schedule and guidance.

    Args:
        size: width and height in pixels.
        frames: pixel frames that the video shall have at least.
        itemsize: bytes of a number; 2 in bfloat16.
    """
    latent_frames = -(-(frames - 1) // FRAME_STRIDE) + 1
    chunks = -(-latent_frames // family.chunk_frames)
    schedule = ChunkSchedule(chunks, family.steps, family.lag)
    _, patch_height, patch_width = config.patch_size
    shape = HistoryShape(
        layers=config.num_layers,
        batch=1,
        heads=config.num_heads,
        head_dim=config.dim // config.num_heads,
        grid=(-(-size[1] // (VAE_STRIDE * patch_height)), -(-size[0] // (VAE_STRIDE * patch_width))),
        chunk_frames=family.chunk_frames,
        capacity=history.capacity(schedule),
    )
    branches = 1 if family.guidance == 1.0 else 2
    unbounded = replace(shape, capacity=chunks).bytes(itemsize)
    if family.attention == "rolling":
        planned = rolling_bytes(replace(shape, capacity=chunks), itemsize)
    else:
        planned = shape.planned_bytes(history, itemsize)
    made = FRAME_STRIDE * chunks * family.chunk_frames - (FRAME_STRIDE - 1)
    return HistoryPlan(chunks, made, branches * planned, branches * unbounded)


def plan_magi_history(
    config: MagiConfig,
    size: tuple[int, int],
    frames: int,
    history: HistorySettings = HistorySettings(),
    itemsize: int = 2,
) -> HistoryPlan:
    """The plan of a MAGI-1 run with its published steps; without a budget, of its own range of visible chunks.

    Args:
        size, frames, itemsize: as for `plan_history`.
    """
    schedule = magi_schedule(-(-frames // FRAME_STRIDE), magi_usual(config)[0])
    latent = (1, config.channels, CHUNK_FRAMES, size[1] // VAE_STRIDE, size[0] // VAE_STRIDE)
    shape, _ = history_plan(config, schedule, replace(OFF, history=history), MagiSampling(), latent)
    unbounded = replace(shape, capacity=schedule.total_chunks).bytes(itemsize)
    return HistoryPlan(schedule.chunks, schedule.chunks * CHUNK_FRAMES * FRAME_STRIDE, shape.bytes(itemsize), unbounded)
