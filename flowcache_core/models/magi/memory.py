"""How much memory a MAGI-1 run takes, from the sizes of its network and of a video alone."""

from math import ceil

from ...errors import UserError
from ...history.plan import MemoryPlan
from ...settings import Settings
from ..memory import latent_size
from ..wan import FRAME_STRIDE
from .config import MagiConfig, magi_usual
from .forward import MagiSampling, magi_plan, magi_schedule, magi_settings
from .sampling import CHUNK_FRAMES


def plan_magi(config: MagiConfig, size: tuple[int, int], frames: int, settings: Settings) -> MemoryPlan:
    """Plans a MAGI-1 run in bfloat16 with its published steps; without a budget, of the chunks that it looks back on.

    Args:
        size, frames, settings: as for `models.memory.plan_wan`.

    Raises:
        UserError: settings that MAGI-1 cannot be run with, a size or length of nothing.
    """
    if frames < 1:
        raise UserError(f"The video has {frames} frames, expected at least 1.")
    sampling = MagiSampling()
    schedule = magi_schedule(ceil(frames / FRAME_STRIDE), magi_usual(config)[0])
    width, height = latent_size(size)
    chunk = (1, config.channels, CHUNK_FRAMES, height, width)
    return magi_plan(config, schedule, magi_settings(settings, sampling, schedule), sampling, chunk)


def magi_frames(frames: int) -> int:
    """Rounds pixel frames up to whole chunks of MAGI-1."""
    return ceil(frames / (FRAME_STRIDE * CHUNK_FRAMES)) * FRAME_STRIDE * CHUNK_FRAMES
