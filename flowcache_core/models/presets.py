"""Settings of a run, and the recommended ones for each family of models, with where each number comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import UserError
from ..history.compression import BY_FRAMES, Compression
from ..history.settings import HistorySettings
from ..reuse.placement import error, spread
from ..reuse.policies import Always, Chunkwise, FixedSteps, Global, Periodic, Policy
from ..schedule import ChunkSchedule

# Expected error (`spread.error`) below which a parabola forecasts better than a line: on the demo model from 12
# recomputed steps of a chunk on, with MAGI-1's schedule and with SkyReels-V2's.
DENSE = 70.0

PolicyName = Literal["off", "even", "spread", "fixed", "flowcache", "teacache"]


@dataclass(frozen=True)
class ReuseSettings:
    """When to recompute, and what to use instead.

    Attributes:
        policy: "off" recomputes every step; "even" every `every`-th; "spread" a `share` of them, denser towards the
            end; "fixed" the listed `steps`; "flowcache" by each chunk's own drift; "teacache" by the whole window's.
        every: of "even". It is lowered to a divisor of the schedule's lag, so that active chunks recompute on the same
            ticks, and so that a chunk gets at least `least` recomputed steps: few-step models are left as they are.
        least: recomputed steps that "even" and "spread" leave a chunk.
        share: of "spread", above 0 to 1.
        steps: of "fixed", with the lag to `align` to or None; of "spread" where steps and lag are `made_for`.
        threshold: of "flowcache" and "teacache", accumulated relative L1 change.
        rescale: polynomial for that change, highest power first, or None.
        warmup: first steps of a chunk that are always recomputed (not for "fixed").
        last: a chunk's last step is always recomputed (not for "fixed").
        order: of the forecast and the correction over the step number: 0 holds, 1 linear, 2 quadratic; None takes 2
            where the recomputed steps of a list lie close (`DENSE`), else 1.
        held: what is held or forecast: the velocity, or the blocks' residual with the head run again.
        correct: takes reused steps again once the next recomputed velocity is known, see `reuse.Corrector`.
    """

    policy: PolicyName = "off"
    every: int = 8
    least: int = 6
    share: float = 0.125
    steps: Sequence[int] = ()
    align: int | None = None
    made_for: tuple[int, int] | None = None
    threshold: float = 0.1
    rescale: Sequence[float] | None = None
    warmup: int = 1
    last: bool = False
    order: int | None = None
    held: Literal["velocity", "residual"] = "velocity"
    correct: bool = True

    def __post_init__(self):
        if self.order not in (None, 0, 1, 2):
            raise UserError(f"The forecast order is {self.order}, expected 0 (hold), 1 (linear) or 2 (quadratic).")
        if self.threshold < 0:
            raise UserError(f"The threshold is {self.threshold}, expected 0 or more.")
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"The share of recomputed steps is {self.share}, expected above 0 to 1.")
        if self.every < 1 or self.warmup < 0:
            raise UserError(f"every is {self.every} and warmup {self.warmup}; expected at least 1 and 0.")

    def make(self, schedule: ChunkSchedule) -> Policy:
        """A fresh policy for one run."""
        if self.policy == "off":
            return Always()
        if self.policy == "even":
            every = max(1, min(self.every, schedule.steps // self.least))
            while schedule.lag % every:
                every -= 1
            return Periodic(every, self.warmup, self.last)
        if self.policy == "spread":
            if self.made_for == (schedule.steps, schedule.lag):
                return FixedSteps(self.steps)
            count = max(self.least, round(self.share * schedule.steps))
            # A longer first chunk has steps that a list of all steps of the others does not name.
            return Always() if count >= schedule.steps else FixedSteps(spread(schedule, count))
        if self.policy == "fixed":
            return FixedSteps(self.steps, self.align)
        if self.policy == "flowcache":
            return Chunkwise(self.threshold, self.warmup, self.last, self.rescale)
        if self.policy == "teacache":
            return Global(self.threshold, self.warmup, self.last, self.rescale)
        raise UserError(f"The policy is '{self.policy}', expected off, even, spread, fixed, flowcache or teacache.")

    def order_on(self, schedule: ChunkSchedule) -> int:
        """Order of the forecast on a schedule."""
        if self.order is not None:
            return self.order
        policy = self.make(schedule)
        dense = isinstance(policy, FixedSteps) and error(frozenset({0, *policy.steps}), schedule.steps) < DENSE
        return 2 if dense else 1


@dataclass(frozen=True)
class Settings:
    """Everything that FlowCache does to a run.

    Attributes:
        reuse: when to recompute and what stands in.
        history: how much clean history is kept and how it is cut.
        clean_pass: run every finished chunk once more at noise level 0 and keep those keys and values; without it the
            keys of its last recomputed step stay (the published FlowCache).
        overlap: on a CUDA device, copies to and from system memory and decoding go on beside the network, on a stream
            of their own; see `side_stream`. The result is the same.
    """

    reuse: ReuseSettings = field(default_factory=ReuseSettings)
    history: HistorySettings = field(default_factory=HistorySettings)
    clean_pass: bool = True
    overlap: bool = True


OFF = Settings()

# Steps spread by rule, forecast and corrected, won over every published rule in the project's own
# trials on the demo model; how many of them are recomputed was read off the same curves (`make bench`). The paper's
# settings are those of its MAGI-1 runs (threshold 0.01 and 0.015, warm-up 5, velocity held, no clean pass);
# SkyReels-V2's stand with its family.
PRESETS: dict[str, Settings] = {
    "off": OFF,
    "high": Settings(ReuseSettings("spread", share=20 / 64, least=10)),
    "balanced": Settings(ReuseSettings("spread", share=12 / 64, least=6)),
    "fast": Settings(ReuseSettings("spread", share=8 / 64, least=4)),
    "paper slow": Settings(
        ReuseSettings("flowcache", threshold=0.01, warmup=5, order=0, correct=False), clean_pass=False
    ),
    "paper fast": Settings(
        ReuseSettings("flowcache", threshold=0.015, warmup=5, order=0, correct=False), clean_pass=False
    ),
}
DEFAULT_PRESET = "balanced"


def preset(name: str, budget: int | None = None, compression: Compression = BY_FRAMES) -> Settings:
    """A preset by name, with a history budget in clean chunks if wanted.

    Raises:
        UserError: no such preset, or a budget smaller than what must stay.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset '{name}'. There are: {', '.join(PRESETS)}.")
    history = HistorySettings(budget, compression)
    return replace(PRESETS[name], history=history)


def describe(settings: Settings) -> str:
    """A line for a report: the preset's name and the budget."""
    plain = replace(settings, history=OFF.history, overlap=OFF.overlap)
    names = [name for name, known in PRESETS.items() if known == plain]
    budget = settings.history.budget
    return f"FlowCache {names[0] if names else 'custom'}, " + (
        f"history budget {budget} chunks" if budget else "whole history"
    )
