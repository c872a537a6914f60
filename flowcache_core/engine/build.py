"""A run, put together: the memory planned, the forward that fits, the loop around it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..history.cache import Attention
from ..history.plan import MemoryPlan, plan_memory, window_bytes
from ..history.positions import RotaryTables
from ..history.room import check_room, placed
from ..history.snapshot import Snapshot
from ..report import Report
from ..reuse.policies import Policy, aligned
from ..schedule import ChunkSchedule, Given, Shot
from ..settings import Settings
from .anew import Anew, AnewHistory, Before, held, run_together
from .causal import CausalForward
from .counted import counted
from .forward import Forward
from .guidance import Guidance
from .idle import idle_notes, uncut_notes
from .joint import JointForward
from .layers import by_chunk, has_stacks
from .loop import Boundary, Engine, Progress, Sampling, check_cancelled
from .pictures import NO_HISTORY, PicturesForward, Scenes
from .rolling import RollingForward, rolling_bytes
from .shots import ShotRule, Shots

Seeing = Literal["causal", "joint", "rolling", "pictures"]  # how chunks see each other
NOT_ANEW = (
    "the history is not computed anew, as this family does it: that takes one chunk after the other, with the lag at "
    "the steps"
)
NO_SHOTS = "no shot begins in this run: that takes one chunk after the other, with the lag at the steps"
IN_ORDER: tuple[Seeing, ...] = ("causal", "pictures")  # those in which chunks follow one another


@dataclass(frozen=True)
class RunSettings:
    """What a run is put together from.

    Attributes:
        backbone: runs the network by layers, see `models.wan.WanBackbone`.
        guidance: from branches to one velocity.
        schedule, settings, sampling: of the run.
        seeing: chunk by chunk over a history ("causal"), all chunks of a window together ("joint"), or the active ones
            ("rolling"), or each from pictures of the one before ("pictures").
        shape: of a chunk, [B, C, T, H, W].
        branches, texts: how many branches of guidance there are, and different texts for each.
        text_tokens: of a text at most.
        dtype, device: that is computed with.
        lead, end: given frames that fill no chunk.
        last_frames: of the last chunk where it is shorter than the others, else 0. Nothing comes after such a one, so
            it is not stored.
        attention: over the history.
        loaded: clean history of an earlier run, by branch.
        beside: bytes of latents that the caller will hold in the end, which count as the run's.
        grain: fresh unit noise for a tick of the frames that a joint window begins with.
        scenes: what chunks that see pictures are shown.
        on_progress, cancelled, steer: as for `Engine`.
        label: of the settings, for the report.
        anew: what of a history is computed anew, or None; for "causal".
        before: what the run goes on from, where that is computed anew.
        shots: how the family makes shots, or None; for "causal".
        new_shot: says whether a chunk begins a new shot.
        shot: that the run goes on in.
    """

    backbone: Any
    guidance: Guidance
    schedule: ChunkSchedule
    settings: Settings
    sampling: Sampling
    seeing: Seeing
    shape: Sequence[int]
    branches: int
    dtype: torch.dtype
    device: torch.device
    texts: int = 1
    text_tokens: int = 0
    lead: int = 0
    end: int = 0
    last_frames: int = 0
    attention: Attention = F.scaled_dot_product_attention
    loaded: Mapping[Hashable, Snapshot] | None = None
    beside: int = 0
    grain: Callable[[int], Tensor] | None = None
    scenes: Scenes | None = None
    on_progress: Callable[[Progress], None] = lambda progress: None
    cancelled: Callable[[], bool] = lambda: False
    steer: Callable[[Boundary], bool] = lambda ahead: False
    label: str = ""
    anew: Anew | None = None
    before: Before | None = None
    shots: ShotRule | None = None
    new_shot: Callable[[int], bool] = lambda chunk: False
    shot: Shot = Shot()


def build_engine(run: RunSettings, make: Callable[..., CausalForward] = CausalForward) -> Engine:
    """Makes a run ready to go, with its memory allocated; given frames are to be run next, see `Engine.give`.

    Args:
        make: of a causal run's forward.

    Raises:
        UserError: there is less memory than the run takes; or two networks are run otherwise than they can be.
    """
    _check_networks(run)
    if run.seeing == "causal":
        run = replace(run, settings=held(run.anew, run.settings, run.shape[2], run.schedule.max_active))
    settings, schedule, report = run.settings, run.schedule, Report(run.schedule, run.label)
    policy = settings.reuse.policy(schedule)
    report.notes += idle_notes(settings.reuse, schedule)
    forward: Forward
    sampling = run.sampling
    if run.seeing == "joint":
        report.notes += uncut_notes(settings, schedule, run.shape[2], joint=True, at_once=False)
        check_room(_window_bytes(run, schedule.total_chunks), run.device)
        first, start = run.sampling.sigmas[0], run.sampling.start
        forward = JointForward(
            run.backbone, run.guidance, report, schedule, first, start, run.grain,
            tables=_tables(run), **_shared(run, report),
        )  # fmt: skip
    elif run.seeing == "rolling":
        batch, _, frames, *size = run.shape
        sizes, grid = run.backbone.sizes, run.backbone.grid(*size)
        a_branch = rolling_bytes(sizes, grid, schedule, frames, batch, run.dtype.itemsize)
        report.history_bytes_planned = run.branches * a_branch
        check_room(report.history_bytes_planned + _window_bytes(run, schedule.max_active), run.device)
        forward = RollingForward(
            run.backbone, run.guidance, report, run.shape[2], tables=_tables(run), **_shared(run, report)
        )
    elif run.seeing == "pictures":
        report.notes += [NO_HISTORY] if settings.history.bounded else []
        check_room(_window_bytes(run, 1), run.device)
        pictures = PicturesForward(
            run.backbone, run.guidance, report, schedule, run.scenes, run.dtype,
            tables=_tables(run), **_shared(run, report),
        )  # fmt: skip
        forward, sampling = pictures, replace(sampling, start=partial(pictures.start, sampling.start))
    else:
        forward = causal_forward(run, policy, report, make)
    return Engine(forward, schedule, policy, settings.between, sampling, run.on_progress, run.cancelled, run.steer)


def _check_networks(run: RunSettings) -> None:
    """That two networks are run as they were trained."""
    if has_stacks(run.backbone) and (run.seeing != "causal" or run.schedule.max_active > 1):
        raise UserError(
            "This family runs two networks, so its chunks follow one another over a history; set attention to causal "
            f"and lag to {run.schedule.steps}, the number of steps."
        )


def causal_forward(
    run: RunSettings, policy: Policy, report: Report, make: Callable[..., CausalForward] = CausalForward
) -> CausalForward:
    """Makes a run's forward over a history, with its memory planned.

    Raises:
        UserError: there is less memory than that.
    """
    plan = placed(plan_run(run, policy), run.device, run.beside)
    at_once = plan.kind == "shared" or run.settings.history.compression.at_once
    report.notes += uncut_notes(run.settings, run.schedule, run.shape[2], joint=False, at_once=at_once)
    anew = None
    if has_stacks(run.backbone):
        report.stores = len(run.backbone.stacks(0.0, clean=True))
    if run.anew is not None and run.schedule.max_active == 1:
        done = run.lead + run.schedule.prefix * run.shape[2] if run.loaded is not None else 0
        anew, report.stores = AnewHistory(run.anew, plan, run.settings, run.before, done), int(not run.anew.always)
    elif run.anew is not None:
        report.notes.append(NOT_ANEW)
    shots = None
    if run.shots is not None and run.schedule.max_active == 1:
        shots, report.shot = Shots(run.shots, run.new_shot, plan, run.shot), run.shot
    elif run.shots is not None:
        report.notes.append(NO_SHOTS)
    return make(
        run.backbone,
        run.guidance,
        plan,
        run.settings,
        report,
        aligned=aligned(policy, run.schedule),
        dtype=run.dtype,
        device=run.device,
        loaded=run.loaded,
        order=run.settings.between.order_for(policy, run.schedule.steps),
        anew=anew,
        shots=shots,
        **_shared(run, report),
    )


def _window_bytes(run: RunSettings, chunks: int) -> int:
    """What a window of so many chunks takes, with the frames that are given beside them and the latents in the end."""
    batch, channels, chunk_frames, *size = run.shape
    frames, sizes = chunks * chunk_frames + run.lead + run.end, replace(run.backbone.sizes, text_tokens=run.text_tokens)
    forward = window_bytes(sizes, run.backbone.grid(*size), frames, run.branches * batch, run.dtype.itemsize)
    return forward + batch * channels * frames * prod(size) * run.dtype.itemsize + run.beside


def _tables(run: RunSettings) -> RotaryTables:
    """Rotary tables of a window's frames; those that are given may come on top."""
    chunks = 1 if run.seeing == "pictures" else run.schedule.total_chunks
    grid, frames = run.backbone.grid(*run.shape[3:]), chunks * run.shape[2]
    return RotaryTables(run.backbone.rotary, grid, run.device, frames)


def _shared(run: RunSettings, report: Report) -> dict[str, Any]:
    """What every forward is made from."""
    return {"attention": counted(run.attention, report), "check": partial(check_cancelled, run.cancelled, report)}


def plan_run(run: RunSettings, policy: Policy) -> MemoryPlan:
    """Plans the memory of a run over a history."""
    return plan_memory(
        replace(run.backbone.sizes, text_tokens=run.text_tokens),
        run.schedule,
        run.settings,
        policy,
        grid=run.backbone.grid(*run.shape[3:]),
        chunk_frames=run.shape[2],
        batch=run.shape[0],
        branches=run.branches,
        itemsize=run.dtype.itemsize,
        given=(run.lead, run.end),
        at_once=run.guidance.at_once and not by_chunk(run.backbone),
        texts=run.texts,
        last_frames=run.last_frames,
        rerun=run_together(run.anew, run.shape[2]),
    )


def given_chunks(latent: Tensor, lead: int, chunk_frames: int) -> list[tuple[int | Given, Tensor]]:
    """Cuts given frames [B, C, T, H, W] into a lead, which fills no chunk, and whole chunks."""
    whole = latent[:, :, lead:].split(chunk_frames, dim=2) if latent.shape[2] > lead else []
    return [*([(Given.LEAD, latent[:, :, :lead])] if lead else []), *enumerate(whole)]
