"""How much memory a run takes, from the sizes of a network and of a video alone: `history.plan` for each family."""

from math import ceil

from ..engine.anew import held, run_together
from ..engine.rolling import rolling_bytes
from ..errors import UserError
from ..history.plan import MemoryPlan, plan_memory, window_bytes
from ..schedule import ChunkSchedule
from ..settings import Settings
from .experts import experts_sizes
from .families import Family
from .latent_spaces import stride_of
from .longvie import HISTORY_FRAMES
from .wan import FRAME_STRIDE, WanConfig


def plan_wan(
    config: WanConfig, family: Family, size: tuple[int, int], frames: int, settings: Settings, lag: int | None = None
) -> MemoryPlan:
    """Plans a run in bfloat16 over a history, with a family's steps, chunks and branches of guidance.

    Args:
        size: width and height in pixels.
        frames: pixel frames that the video shall have at least.
        settings: of the run.
        lag: ticks between the starts of two chunks; None takes the family's.

    Raises:
        UserError: a lag that does not fit, a size or length of nothing.
    """
    schedule = _wan_schedule(family, frames, lag)
    settings = held(family.anew, settings, family.chunk_frames, schedule.max_active)
    return plan_memory(
        config.sizes if family.boundary is None else experts_sizes(config.sizes),
        schedule,
        settings,
        settings.reuse.policy(schedule),
        grid=_grid(config, size),
        chunk_frames=family.chunk_frames,
        branches=_branches(family),
        rerun=run_together(family.anew, family.chunk_frames),
    )


def rolling_history_bytes(config: WanConfig, family: Family, size: tuple[int, int], frames: int) -> int:
    """Works out what the history of a Rolling Forcing run in bfloat16 grows to; it has no budget and no plan.

    Args:
        size, frames: as for `plan_wan`.
    """
    schedule, grid = _wan_schedule(family, frames, None), _grid(config, size)
    return _branches(family) * rolling_bytes(config.sizes, grid, schedule, family.chunk_frames, rows=1, itemsize=2)


def pictures_bytes(config: WanConfig, family: Family, size: tuple[int, int]) -> int:
    """Works out what a forward over a chunk in bfloat16 takes, for LongVie 2, which keeps no history.

    Args:
        size: as for `plan_wan`.
    """
    frames = family.chunk_frames + HISTORY_FRAMES
    return window_bytes(config.sizes, _grid(config, size), frames, rows=_branches(family), itemsize=2)


def pictures_chunks(family: Family, frames: int) -> tuple[int, int]:
    """Rounds pixel frames up to whole chunks that each begin a video of their own; gives chunks and frames."""
    each = FRAME_STRIDE * (family.chunk_frames - 1) + 1
    return ceil(frames / each), ceil(frames / each) * each


def wan_frames(family: Family, frames: int) -> int:
    """Rounds pixel frames up to whole chunks of a family."""
    return FRAME_STRIDE * _wan_chunks(family, frames) * family.chunk_frames - (FRAME_STRIDE - 1)


def _wan_schedule(family: Family, frames: int, lag: int | None) -> ChunkSchedule:
    first = family.first_levels(family.steps)
    return ChunkSchedule(
        _wan_chunks(family, frames),
        family.steps,
        family.lag if lag is None else lag,
        first_steps=len(first) - 1 if first else None,
    )


def _wan_chunks(family: Family, frames: int) -> int:
    if frames < 1:
        raise UserError(f"The video has {frames} frames, expected at least 1.")
    return ceil((ceil((frames - 1) / FRAME_STRIDE) + 1) / family.chunk_frames)


def _grid(config: WanConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens of a frame."""
    width, height = latent_size(size, config.out_dim)
    _, patch_height, patch_width = config.patch_size
    return ceil(height / patch_height), ceil(width / patch_width)


def _branches(family: Family) -> int:
    return 1 if family.guidance == 1.0 else 2


def latent_size(size: tuple[int, int], channels: int = 16) -> tuple[int, int]:
    """Gives width and height of the latent of a video of so many pixels.

    Args:
        channels: of the latent.

    Raises:
        UserError: a size of nothing.
    """
    (width, height), stride = size, stride_of(channels)
    if min(size) < stride:
        raise UserError(f"The video is {width} x {height} pixels, expected at least {stride} x {stride}.")
    return width // stride, height // stride
