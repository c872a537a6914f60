"""Settings of a run: when chunks are recomputed, what stands in between, how much history is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from .errors import UserError
from .reuse.placement import expected_error, place_steps
from .reuse.policies import DriftPolicy, FixedPolicy, Policy
from .schedule import ChunkSchedule

# Expected error (`placement.expected_error`) below which a parabola forecasts better than a line: on the demo model
# from 12 recomputed steps of a chunk on, with MAGI-1's schedule and with SkyReels-V2's.
DENSE = 70.0


@dataclass(frozen=True)
class Off:
    """Recomputes every step."""

    def policy(self, schedule: ChunkSchedule) -> Policy:
        """Makes the policy of one run."""
        return FixedPolicy(lambda step, steps: True)


@dataclass(frozen=True)
class Every:
    """Recomputes every n-th step.

    Attributes:
        n: lowered to a divisor of the schedule's lag, so that active chunks recompute on the same ticks, and so that a
            chunk gets at least `least` recomputed steps.
        least: recomputed steps that a chunk keeps.
        warmup: first steps of a chunk that are always recomputed.
        last: whether a chunk's last step always is.
    """

    n: int
    least: int = 1
    warmup: int = 1
    last: bool = False

    def __post_init__(self):
        if self.n < 1 or self.warmup < 0:
            raise UserError(f"every is {self.n} and warmup {self.warmup}; expected at least 1 and 0.")

    def policy(self, schedule: ChunkSchedule) -> Policy:
        """Makes the policy of one run."""
        n = max(1, min(self.n, schedule.steps // self.least))
        while schedule.lag % n:
            n -= 1
        return FixedPolicy(lambda step, steps: step < self.warmup or step % n == 0 or (self.last and step == steps - 1))


@dataclass(frozen=True)
class Spread:
    """Recomputes a share of a chunk's steps, placed where least is lost (`reuse.placement`).

    Attributes:
        share: above 0 to 1.
        least: recomputed steps that a chunk keeps, so that few-step models are left as they are.
        steps: a list that was measured for one schedule, taken there instead.
        made_for: steps and lag of that schedule.
    """

    share: float
    least: int = 6
    steps: tuple[int, ...] = ()
    made_for: tuple[int, int] | None = None

    def __post_init__(self):
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"The share of recomputed steps is {self.share}, expected above 0 to 1.")

    def policy(self, schedule: ChunkSchedule) -> Policy:
        """Makes the policy of one run."""
        if self._is_made_for(schedule):
            return Fixed(self.steps).policy(schedule)
        count = max(self.least, round(self.share * schedule.steps))
        if count + 1 == schedule.max_active:  # a step more, and every chunk begins beside recomputed ones
            count += 1
        # A longer first chunk has steps that a list of all steps of the others does not name.
        if count >= schedule.steps:
            return Off().policy(schedule)
        return Fixed([schedule.skipped + step for step in place_steps(schedule, count)]).policy(schedule)

    def _is_made_for(self, schedule: ChunkSchedule) -> bool:
        """Whether the list is of this schedule, or of one whose last steps this one takes."""
        if self.made_for is None:
            return False
        steps, lag = self.made_for
        one_by_one = schedule.lag == schedule.steps and lag >= schedule.lag
        return steps == schedule.whole_steps and (lag == schedule.lag or bool(schedule.skipped and one_by_one))


@dataclass(frozen=True)
class Fixed:
    """Recomputes the listed steps, the same for every chunk; of chunks that start from a video, they are counted as if
    those started from noise."""

    steps: Sequence[int]

    def policy(self, schedule: ChunkSchedule) -> Policy:
        """Makes the policy of one run."""
        listed = frozenset(self.steps)
        return FixedPolicy(lambda step, steps: step + schedule.skipped in listed)


@dataclass(frozen=True)
class Drift:
    """Recomputes when the input has drifted; see `policies.DriftPolicy` for the fields.

    Attributes:
        holds: what is held between: the velocity, or the blocks' residual of each branch, with the head run again at
            every step (the published rule for SkyReels-V2).
    """

    threshold: float
    warmup: int = 5
    last: bool = False
    rescale: Sequence[float] | None = None
    whole_window: bool = False
    holds: Literal["velocity", "residual"] = "velocity"

    def __post_init__(self):
        if self.threshold < 0:
            raise UserError(f"The threshold is {self.threshold}, expected 0 or more.")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}, expected 0 or more.")

    def policy(self, schedule: ChunkSchedule) -> Policy:
        """Makes the policy of one run."""
        return DriftPolicy(self.threshold, self.warmup, self.last, self.rescale, self.whole_window)


Reuse = Off | Every | Spread | Fixed | Drift


@dataclass(frozen=True)
class Between:
    """What stands in for a step that is not recomputed.

    Attributes:
        order: of the forecast and the correction over the step number: 0 holds, 1 linear, 2 quadratic; None takes 2
            where the recomputed steps lie close (`DENSE`), else 1.
        correct: takes reused steps again once the next recomputed velocity is known, see `forecast.Corrector`.
    """

    order: int | None = None
    correct: bool = True

    def __post_init__(self):
        if self.order not in (None, 0, 1, 2):
            raise UserError(f"The forecast order is {self.order}, expected 0 (hold), 1 (linear) or 2 (quadratic).")

    def order_for(self, policy: Policy, steps: int) -> int:
        """Chooses the order for a policy and a chunk of so many steps."""
        if self.order is not None:
            return self.order
        chosen = policy.recomputed(steps)
        dense = chosen is not None and len(chosen) < steps and expected_error(chosen, steps) < DENSE
        return 2 if dense else 1


HELD = Between(order=0, correct=False)  # the published rules hold the last result as it is


Rule = Literal["flowcache", "window", "rolling sink", "random"]


@dataclass(frozen=True)
class Compression:
    """How the history is cut to its budget.

    Attributes:
        rule: "flowcache" scores tokens; "window" keeps the newest; "rolling sink" keeps the newest chunk and shows the
            video's beginning before it, to and fro (`history.rolling_sink`), for models that were trained on short
            videos: it needs relative positions and whole chunks; "random" keeps a random choice (to compare with).
        weight: lambda; score = lambda * importance - (1 - lambda) * redundancy.
        pool: width of the max-pooling of importance along the tokens, odd.
        granularity: whole frames or chunks may be kept by their mean score instead of single tokens by their own.
        asking: whose queries weigh the importance: the newest chunk's (MAGI-1) or the oldest active one's
            (SkyReels-V2).
        queries: how many of that chunk's tokens ask; 0 asks with the whole chunk.
        asked_from: those queries lie spread over the chunk, or are its last ones.
        at_once: cut as soon as the history is over its budget, as a window's last chunks find it (SkyReels-V2); else
            when another chunk begins (MAGI-1). Chunks that share memory between layers are always cut at once.
        protect_first: the first chunk (sink) always stays, where there is room for more than one.
        protect_newest: the newest clean chunk always stays.
        sink: frames of the video's beginning that always stay (`sink_size` of Self-Forcing and its kin); None leaves
            it to protect_first.
        sink_share: what each cut leaves of the sink; the rest of it comes from the frames that are dropped, place by
            place, so that the sink follows the video slowly (Reward Forcing's `compression_alpha`; 1 leaves the sink as
            it is). Needs the rule "window", relative positions and a sink as long as a chunk.
    """

    rule: Rule = "flowcache"
    weight: float = 0.07
    pool: int = 7
    granularity: Literal["token", "frame", "chunk"] = "token"
    asking: Literal["newest", "oldest"] = "newest"
    queries: int = 256
    asked_from: Literal["spread", "last"] = "spread"
    at_once: bool = False
    protect_first: bool = False
    protect_newest: bool = False
    sink: int | None = None
    sink_share: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.sink_share <= 1.0:
            raise UserError(f"The share of the sink that stays is {self.sink_share}, expected above 0 to 1.")
        if self.moves_sink and (self.rule != "window" or not self.sink):
            raise UserError("A sink that takes up dropped frames needs the rule 'window' and a sink in frames.")
        if self.sink is not None and self.sink < 0:
            raise UserError(f"The sink is {self.sink} frames, expected 0 or more.")
        if self.rule not in get_args(Rule):
            raise UserError(
                f"rule is '{self.rule}', expected {', '.join(get_args(Rule)[:-1])} or {get_args(Rule)[-1]}."
            )
        if self.rolls_sink and (self.sink or self.protect_first):
            raise UserError("A rolling sink walks through the beginning; no part of it can be told to stay as well.")
        if self.granularity not in ("token", "frame", "chunk"):
            raise UserError(f"granularity is '{self.granularity}', expected token, frame or chunk.")
        if not 0.0 <= self.weight <= 1.0:
            raise UserError(f"weight (lambda) is {self.weight}, expected 0 to 1.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"pool is {self.pool}, expected an odd number of at least 1.")
        if self.queries < 0:
            raise UserError(f"queries is {self.queries}, expected 0 (the whole chunk) or more.")

    @property
    def moves_sink(self) -> bool:
        """Whether the sink changes at a cut."""
        return self.sink_share < 1.0

    @property
    def rolls_sink(self) -> bool:
        """Whether the beginning is shown again and again."""
        return self.rule == "rolling sink"

    @property
    def protected_chunks(self) -> int:
        return int(self.protect_first and self.sink is None) + int(self.protect_newest)


# How the paper's runs cut: MAGI-1's on VBench (FlowCache4MAGI-1, yaml_config/sample/flowcache_vbench.yaml) and
# SkyReels-V2's (FlowCache4SkyReels-V2, modules/compression/compress_kv.py and transformer_flowcache.py).
MAGI_PAPER_CUT = Compression(queries=0)
SKYREELS_PAPER_CUT = Compression(queries=0, asking="oldest", at_once=True)

# What stays unless told otherwise: whole frames and the first chunk. With a budget of 3 chunks on the demo model, that
# was more alike to the whole history than the published choice of single tokens, which the defaults above make.
BY_FRAMES = Compression(weight=0.15, granularity="frame", protect_first=True)


HistoryType = Literal["as computed", "int8", "int4"]
HISTORY_TYPES: tuple[HistoryType, ...] = get_args(HistoryType)


@dataclass(frozen=True)
class HistorySettings:
    """How much clean history a run keeps.

    Attributes:
        budget: clean chunks that are kept, or None for all of them.
        window: instead of a budget: frames that a chunk sees at most, its own and the sink included (`local_attn_size`
            of Self-Forcing and its kin). Where several chunks are active, the older ones are seen besides.
        compression: how the history is cut when it is over budget.
        relative: rotary positions count from the start of the window, not of the video, so that a run of any length
            uses only positions from 0 to (budget + active) chunks; kept frames follow one another without gaps. Needs a
            budget.
        memory: "auto" keeps the history on the device that computes, and moves its oldest chunks to system memory, one
            after another, when that device runs out; "system" keeps all of it there from the start. What is there is
            brought back for attention, a layer at a time.
        type: clean keys and values are stored as they are computed, or in 8 or 4 bits (`history.quantised`) and widened
            when a layer is attended to.
    """

    budget: int | None = None
    compression: Compression = field(default_factory=Compression)
    relative: bool = False
    memory: Literal["auto", "system"] = "auto"
    type: HistoryType = "as computed"
    window: int | None = None

    def __post_init__(self):
        if self.window is not None:
            self._check_window(self.window)
        if self.type not in HISTORY_TYPES:
            raise UserError(f"The history type is '{self.type}', expected {', '.join(HISTORY_TYPES)}.")
        if self.budget is not None and self.budget < max(1, self.compression.protected_chunks):
            raise UserError(
                f"The history budget is {self.budget} chunks, but at least {max(1, self.compression.protected_chunks)} "
                "must stay; raise the budget or protect fewer chunks."
            )
        if self.relative and not self.bounded:
            raise UserError(
                "Positions relative to the window need a history budget; set one, or use absolute positions."
            )
        if self.compression.moves_sink and not self.relative:
            raise UserError("A sink that takes up dropped frames has no place in the video; use relative positions.")
        if self.compression.rolls_sink and self.bounded and not self.relative:
            raise UserError("The frames of a rolling sink move on with the video; use relative positions.")

    def _check_window(self, window: int) -> None:
        if self.budget is not None:
            raise UserError(
                f"Both a budget of {self.budget} chunks and a window of {window} frames are set; leave one away."
            )
        if window < 2:
            raise UserError(f"The window is {window} frames, expected at least 2: a chunk's own count.")
        if self.compression.granularity == "chunk" and self.compression.rule != "window":
            raise UserError("A window in frames cannot keep whole chunks by their score; keep frames or single tokens.")

    @property
    def bounded(self) -> bool:
        """Whether some of the history may be dropped."""
        return self.budget is not None or self.window is not None

    def kept_frames(self, chunk_frames: int) -> int | None:
        """Counts the clean frames that are kept beside a chunk of so many; None for all of them.

        Raises:
            UserError: the window has no room for them, or less than what must stay.
        """
        if self.window is None:
            kept = None if self.budget is None else self.budget * chunk_frames
        else:
            kept = self.window - chunk_frames
        least = max(1, self.compression.protected_chunks * chunk_frames + (self.compression.sink or 0))
        if kept is not None and kept < least:
            held = f"budget is {self.budget} chunks" if self.window is None else f"window is {self.window} frames"
            raise UserError(
                f"The history {held}, which leaves {kept} frames beside a chunk of {chunk_frames}, but {least} must "
                "stay; raise it or make the sink smaller."
            )
        if (
            kept is not None
            and self.compression.moves_sink
            and (self.compression.sink != chunk_frames or kept % chunk_frames)
        ):
            raise UserError(
                f"A sink that takes up dropped frames must be as long as a chunk of {chunk_frames} frames, and the "
                f"window a whole number of chunks; the sink is {self.compression.sink}, and {kept} frames are kept."
            )
        if kept is not None and self.compression.rolls_sink and (kept < 2 * chunk_frames or kept % chunk_frames):
            raise UserError(
                f"A rolling sink needs a window of whole chunks, three at least with a chunk's own; chunks have "
                f"{chunk_frames} frames, and the window leaves {kept} frames beside one."
            )
        return kept

    @property
    def size_words(self) -> str:
        """How much is kept, for a report."""
        if self.window is None:
            return f"history budget {self.budget} chunks" if self.budget else "whole history"
        sink = ", rolling sink" if self.compression.rolls_sink else ""
        if self.compression.sink:
            sink = f", sink {self.compression.sink}"
        return f"history window {self.window} frames{sink}"

    @property
    def keeps_queries(self) -> bool:
        """Whether queries are kept for the next cut."""
        return self.bounded and self.compression.rule == "flowcache"


# What of a history over budget stays, as a user chooses it. "flowcache" and "window" as in `Compression`; the others
# are for videos far longer than a model was trained on, without training, and count positions from the window's start.
HistoryRule = Literal["flowcache", "window", "deep sink", "rolling sink"]
HISTORY_RULES: tuple[HistoryRule, ...] = get_args(HistoryRule)


def bounded_history(
    budget: int | None,
    window: int | None,
    sink: int,
    compression: Compression = BY_FRAMES,
    sink_share: float = 1.0,
    rule: HistoryRule = "flowcache",
    **more: Any,
) -> HistorySettings:
    """Makes a history with a budget in chunks, with a window in frames, or a whole one.

    Args:
        budget, window: as for `HistorySettings`; at most one of them.
        sink: frames at the video's beginning that a window keeps.
        compression: how a budget is cut.
        sink_share: as for `Compression`.
        rule: what stays; of a window in frames "flowcache" leaves the newest. "deep sink": half of the window are the
            video's first frames (Deep Forcing, arXiv 2512.05081, without its choice among the rest); "rolling sink":
            see `history.rolling_sink`.
        more: for `HistorySettings`.

    Raises:
        UserError: both, a sink without a window, or a rule without what it needs.
    """
    if rule in ("deep sink", "rolling sink"):
        if window is None and (rule == "deep sink" or budget is None):
            raise UserError(f"The history rule '{rule}' needs a window in frames; Self-Forcing was trained on 21.")
        if sink or sink_share < 1.0:
            raise UserError(f"The history rule '{rule}' has its own sink; leave sink and sink share as they are.")
        more, sink = more | {"relative": True}, window // 2 if window and rule == "deep sink" else 0
    if rule == "rolling sink":
        compression = replace(compression, rule=rule, protect_first=False)
    elif rule == "window":
        compression = replace(compression, rule=rule)
    if window is None and sink:
        raise UserError(f"A sink of {sink} frames needs a window in frames; set one, or keep the first chunk instead.")
    if window is None and sink_share < 1.0:
        raise UserError("A sink that takes up dropped frames needs a window and a sink in frames.")
    if window is not None:
        cut: Rule = "rolling sink" if compression.rolls_sink else "window"
        compression = replace(compression, rule=cut, sink=sink, protect_first=False, sink_share=sink_share)
    return HistorySettings(budget, compression, window=window, **more)


@dataclass(frozen=True)
class Settings:
    """Everything that FlowCache does to a run.

    Attributes:
        reuse: when to recompute.
        between: what stands in for a step that is not recomputed.
        history: how much clean history is kept and how it is cut.
        clean_pass: run every finished chunk once more at noise level 0 and keep those keys and values; without it the
            keys of its last recomputed step stay (the published FlowCache).
        overlap: on a CUDA device, copies to and from system memory and decoding go on beside the network, on a stream
            of their own; see `history.streams`. The result is the same.
    """

    reuse: Reuse = Off()
    between: Between = Between()
    history: HistorySettings = HistorySettings()
    clean_pass: bool = True
    overlap: bool = True

    @property
    def holds_residual(self) -> bool:
        """Whether the blocks' residual is held, not a velocity."""
        return isinstance(self.reuse, Drift) and self.reuse.holds == "residual"


OFF = Settings()
