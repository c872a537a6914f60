"""Counts what runs of the models that people use ask of a GPU, without one: `python -m flowcache_core.lab.scale`.

Launches, operations, bytes and memory of a forward, a tick, a cut, a chunk and a minute of video, for every preset,
with and without a budget, beside ComfyUI's own forward; a roofline estimate of the time; what fits which card. Writes
report.json, and the page and its plot (docs/scale.md, docs/scale.png).
"""

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from ..history.plan import MemoryPlan
from ..models.magi.config import MagiConfig
from ..models.magi.memory import plan_magi
from ..models.memory import plan_wan
from ..models.wan import FRAME_STRIDE, WanConfig
from ..settings import HistoryType, Settings
from ..storage.files import write_whole
from .meter import Work
from .real_size import MODELS, Model, Steady, attention_work, count_steady, model_of, seen_chunks
from .roofline import BESIDE, CONSUMER, H100, LINK, RTX_4090, Card, seconds
from .scale_page import page
from .stock import count_stock
from .traffic import traffic_rows

PRESETS = ("plain", "high", "balanced", "fast")
PAPER = ("paper slow", "paper fast")
CARDS = (RTX_4090, H100)
HISTORY_TYPE = "as computed"
MOST_CHUNKS = 100_000  # that are tried, of a video that fits


@dataclass(frozen=True)
class Case:
    """A model with one preset, with its budget or the whole history."""

    model: Model
    preset: str
    bounded: bool

    @property
    def settings(self) -> Settings:
        return self.model.settings(self.preset, self.bounded)

    def __str__(self) -> str:
        width, height = self.model.size
        budget = f"budget {self.model.budget}" if self.bounded else "whole history"
        return f"{self.model.name} {width}x{height}, {self.preset}, {budget}"


@dataclass(frozen=True)
class Counted:
    """What a case takes.

    Attributes:
        steady: one lag in the middle of a run, all layers.
        a_layer: launches a layer and forward.
        minute: all work of a minute of video.
    """

    case: Case
    steady: Steady
    a_layer: float
    minute: Work

    @property
    def chunks(self) -> int:
        return self.case.model.chunks()

    @property
    def chunk(self) -> Work:
        """A chunk's mean over the minute."""
        return self.minute * (1 / self.chunks)

    @property
    def forward(self) -> Work:
        """One chunk through the network once, a batch of branches together: the mean over the minute."""
        steady = self.steady
        beside = steady.cut + steady.solver
        return (self.chunk - beside) * (1 / steady.passes)

    @property
    def past(self) -> Work:
        """Of that, attention over the history."""
        cross = self.steady.network.only("attention") * (1 / self.steady.passes)
        return self.forward.only("attention") - cross

    @property
    def tick(self) -> Work:
        """The mean over the minute."""
        return self.chunk * (1 / len(self.steady.ticks))

    @property
    def plan(self) -> MemoryPlan:
        """Memory that a run of a minute plans."""
        return _plan(self.case.model, self.case.settings, self.chunks)

    @property
    def planned(self) -> int:
        """Bytes of history that a run of a minute plans."""
        return self.plan.history_bytes

    @property
    def busy(self) -> int:
        """Ticks of a lag in which the network is run."""
        return sum(bool(tick.places) for tick in self.steady.ticks)


HELD = (  # what a test holds the counts of
    Case(model_of("causal"), "plain", True),
    Case(model_of("skyreels"), "balanced", True),
    Case(model_of("magi"), "balanced", False),
)


def held_figures(counted: Counted) -> dict[str, float]:
    """Gives the figures that may not grow."""
    steady = counted.steady
    figures: dict[str, float] = {"launches a layer": round(counted.a_layer, 4)}
    for name, work in (("a lag's forwards", steady.network + steady.attention), ("cut", steady.cut)):
        figures |= {
            f"{name}: launches": work.launches,
            f"{name}: elementwise bytes": work.only("elementwise").bytes,
            f"{name}: operations": work.flops,
            f"{name}: 32-bit operations": work.flops_by_bits.get(32, 0),
        }
    figures |= {"solver: launches": steady.solver.launches, "read-backs": steady.whole.read_backs}
    return figures | {"history bytes": steady.history, "activation bytes": steady.activations}


def grown(recorded: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> list[str]:
    """Says which figures are larger than recorded, and by how much."""
    told = []
    for case, figures in found.items():
        if case not in recorded:
            told.append(f"{case} was not recorded")
            continue
        for name, value in figures.items():
            before = recorded[case][name]
            if value > before * (1 + 1e-9):
                more = f"+{value / before - 1:.1%}" if before else "there was none"
                told.append(f"{case}: {name} grew from {before:,.10g} to {value:,.10g} ({more})")
    return told


def cases(models: Sequence[Model] = MODELS) -> list[Case]:
    """Lists every model with every preset that differs from plain on its schedule, without and with a budget."""
    every = [
        Case(model, preset, bounded)
        for model in models
        for preset in PRESETS
        for bounded in ((False, True) if model.budget else (False,))
    ]
    return [case for case in every if case.preset == "plain" or not case.model.recomputes_all(case.settings)]


def count(case: Case) -> Counted:
    """Counts one case."""
    model, settings = case.model, case.settings
    led = min(model.led, 1)
    one, two = (count_steady(model, layers, settings, led) for layers in (1, 2))
    steady = one.in_layers(two, model.layers)
    launches = model.layers * _launches(one, two)
    if led:
        both = count_steady(model, 2, settings, 2)
        steady = steady.with_layers(two, both, model.led - 1)
        launches += model.led * _launches(two, both)
    chunks = model.chunks()
    minute = steady.whole * chunks
    if _sees_more(model):
        minute = (steady.network + steady.cut + steady.solver) * chunks + past_work(
            model, settings, chunks, steady.asked
        )
    return Counted(case, steady, launches / (model.layers * steady.passes), minute)


def _launches(one: Steady, two: Steady) -> float:
    """Of the layer by which two counts differ."""
    return (two.network + two.attention).launches - (one.network + one.attention).launches


def _sees_more(model: Model) -> bool:
    """Whether what chunks see of the past grows with the video, up to a budget."""
    return isinstance(model.config, WanConfig) and model.budget > 0


def count_model(model: Model) -> list[Counted]:
    """Counts all cases of a model."""
    return [count(case) for case in cases([model])]


def past_work(model: Model, settings: Settings, chunks: int, recomputed: frozenset[int]) -> Work:
    """Gives the attention over the history in a whole run of so many chunks of a causal model."""
    seen = seen_chunks(model.schedule(chunks), recomputed, settings.history.budget, model.networks)
    return attention_work(model, seen, branches=1 if model.family.guidance == 1.0 else 2)


def planned_history(model: Model, settings: Settings, chunks: int) -> int:
    """Bytes that a run of so many chunks plans for its history, on the device that computes."""
    if not model.budget:
        return 0
    plan = _plan(model, settings, chunks)
    return plan.scratch_bytes + plan.query_bytes if plan.away else plan.history_bytes


def _plan(model: Model, settings: Settings, chunks: int) -> MemoryPlan:
    frames = chunks * model.chunk_frames * FRAME_STRIDE
    if isinstance(model.config, MagiConfig):
        return plan_magi(model.config, model.size, frames, settings)
    return plan_wan(model.config, model.family, model.size, frames - FRAME_STRIDE + 1, settings)


@dataclass(frozen=True)
class Fit:
    """One way to run a model on a card.

    Attributes:
        weights: "bf16", "fp8", or "fp8, streamed" from system memory.
        preset, budget: what it is run with; the budget in chunks, or None for all that the model looks back on.
        history: its type.
        place: where it lives, "card" or "system memory".
        gigabytes: GiB of the card that are used.
        seconds_whole: seconds of video that fit without a budget, by history type; None for any length.
        seconds: a chunk, by the roofline.
    """

    model: Model
    card: Card
    weights: str
    preset: str
    budget: int | None
    history: str
    place: str
    gigabytes: float
    seconds_whole: dict[str, float] | None
    seconds: float


def fits(whole: Counted, bounded: Counted, card: Card) -> tuple[Fit | None, float]:
    """Finds how a model fits a card: the first way of the widest weights on the card and the largest budget up to the
    model's; then weights, then the history in system memory.

    Args:
        whole, bounded: its counted run, without and with a budget.

    Returns:
        None where none fits, and the GiB that the smallest takes.
    """
    model, preset = whole.case.model, whole.case.preset
    looks_back = not _sees_more(model)  # keeps what its chunks look back on, whatever the length
    anew = model.family.anew
    any_length = looks_back or (anew is not None and anew.always)  # keeps as much, whatever the length
    run = whole if looks_back else bounded
    beside = run.steady.held + run.steady.activations + BESIDE * 2**30
    least = float("inf")
    for memory in ("auto", "system"):
        for weights, size in _weights(model):
            for budget in (
                [None] if looks_back else range(model.budget, 0 if model.cut is None else model.budget - 1, -1)
            ):
                named = Case(_with_budget(model, budget), preset, budget is not None).settings
                settings = replace(named, history=replace(named.history, memory=memory))
                used = (size + beside + planned_history(model, settings, model.chunks())) / 2**30
                least = min(least, used)
                if used <= card.memory:
                    time = _chunk_seconds(run, settings, card, "streamed" in weights)
                    place = "card" if memory == "auto" else "system memory"
                    room = card.memory * 2**30 - size - beside
                    fit = Fit(
                        model, card, weights, preset, budget, HISTORY_TYPE, place, used,
                        seconds_whole=None if any_length else _seconds_whole(model, preset, room),
                        seconds=time,
                    )  # fmt: skip
                    return fit, least
    return None, least


def _with_budget(model: Model, budget: int | None) -> Model:
    return replace(model, budget=budget or model.budget)


def _weights(model: Model) -> list[tuple[str, int]]:
    """How weights may lie, and the bytes on the card: all of them, or those of two layers at a time."""
    streamed = 2 * model.weight_bytes(1) // (model.layers * model.networks)
    return [("bf16", model.weight_bytes()), ("fp8", model.weight_bytes(1)), ("fp8, streamed", streamed)]


def _seconds_whole(model: Model, preset: str, room: float) -> dict[str, float]:
    """Seconds of video whose whole history fits into so many bytes, by the type that it is stored in."""
    settings, found = model.settings(preset, bounded=False), {}
    for kept in get_args(HistoryType):
        stored = replace(settings, history=replace(settings.history, type=kept))
        taken = partial(planned_history, model, stored)
        chunks = bisect_right(range(1, MOST_CHUNKS), room, key=taken)
        found[kept] = chunks * model.chunk_frames * FRAME_STRIDE / model.family.fps
    return found


def _chunk_seconds(run: Counted, settings: Settings, card: Card, streamed: bool) -> float:
    """Time of a chunk with the budget that was found, or of the way to the card where that takes longer."""
    model, steady = run.case.model, run.steady
    work = run.chunk
    if _sees_more(model):
        past = past_work(model, settings, model.chunks(), steady.asked) * (1 / model.chunks())
        work = steady.network + steady.cut + steady.solver + past
    moved = model.weight_bytes(1) // model.networks if streamed else 0
    if settings.history.memory == "system":
        moved += _plan(model, settings, model.chunks()).stored_bytes
    return max(seconds(work, card), run.busy * moved / LINK)


def work_row(work: Work) -> dict:
    """Figures of some work in a form that JSON takes; bytes are those of elementwise work and copies."""
    return {
        "launches": round(work.launches, 2),
        "flops": round(work.flops),
        "flops_by_bits": {str(bits): round(flops) for bits, flops in work.flops_by_bits.items()},
        "attention_flops": round(work.only("attention").flops),
        "bytes": round(work.only("elementwise").bytes),
        "product_bytes": round(work.only("product", "attention").bytes),
        "read_backs": round(work.read_backs, 2),
        "seconds": {card.name: seconds(work, card) for card in CARDS},
        "seconds_by_kind": {
            card.name: {kind: seconds(work.only(kind), card) for kind in ("product", "attention", "elementwise")}
            for card in CARDS
        },
    }


def row(counted: Counted) -> dict:
    """One line of the report."""
    case, steady = counted.case, counted.steady
    model = case.model
    schedule = model.schedule(counted.chunks)
    return {
        "model": model.name,
        "size": list(model.size),
        "preset": case.preset,
        "budget": model.budget if case.bounded else None,
        "history_type": HISTORY_TYPE,
        "steps": schedule.steps,
        "recomputed": len(steady.asked),
        "chunks_a_minute": counted.chunks,
        "forwards_a_chunk": steady.passes,
        "layers": model.layers,
        "launches_a_layer": round(counted.a_layer, 2),
        "forward": {
            **work_row(counted.forward),
            "past_seconds": {card.name: seconds(counted.past, card) for card in CARDS},
        },
        "tick": work_row(counted.tick),
        "cut": work_row(steady.cut),
        "chunk": work_row(counted.chunk),
        "minute": work_row(counted.minute),
        "memory": {
            "weights": model.weight_bytes(),
            "history": steady.history,
            "texts_and_tables": steady.held,
            "activations": steady.activations,
        },
    }


def paper_rows(models: Sequence[Model]) -> list[dict]:
    """Memory of the published rules, whose forwards depend on the video and are not counted."""
    asked = [model for model in models if model.family.steps > 10 and model.budget]
    return [
        {
            "model": model.name,
            "size": list(model.size),
            "preset": name,
            "budget": model.budget if bounded else None,
            "history": planned_history(model, _published(model, name, bounded), model.chunks()),
        }
        for model in asked
        for name in PAPER
        for bounded in (False, True)
    ]


def _published(model: Model, name: str, bounded: bool) -> Settings:
    dim = model.config.width if isinstance(model.config, MagiConfig) else model.config.dim
    own = model.family.published(name, dim)
    named = model.settings(name, bounded)
    return named if own is None else Settings(own.reuse, own.between, named.history, own.clean_pass)


def measure(models: Sequence[Model], jobs: int) -> dict:
    """Makes the whole report."""
    with ProcessPoolExecutor(jobs) as pool:
        counted = {one.case: one for some in pool.map(count_model, models) for one in some}
    stock = count_stock(models)
    found = []
    for model in models:
        preset = "balanced" if Case(model, "balanced", False) in counted else "plain"
        whole = counted[Case(model, preset, False)]
        bounded = counted[Case(model, preset, True)] if model.budget else whole
        for card in CONSUMER:
            fit, least = fits(whole, bounded, card)
            given = {"model": model.name, "size": list(model.size), "card": card.name, "memory": card.memory}
            found.append({**given, "fits": fit is not None, "least": least, **(_fit_row(fit) if fit else {})})
    return {
        "rows": [row(one) for one in counted.values()],
        "stock": [
            {
                "model": model.name,
                "size": list(model.size),
                "forward": work_row(each.forward),
                "decode": work_row(each.decode),
            }
            for model, each in stock.items()
        ],
        "published_rules": paper_rows(models),
        "gpus": traffic_rows([model for model in models if _is_divided(model)], tick_seconds(counted)),
        "fits": found,
    }


def tick_seconds(counted: dict[Case, Counted]) -> dict[tuple, float]:
    """How long an H100 takes over a tick that recomputes everything, over the whole history."""
    plain = [one for case, one in counted.items() if case.preset == "plain" and not case.bounded]
    return {(one.case.model.name, *one.case.model.size): seconds(one.tick, H100) for one in plain}


def _is_divided(model: Model) -> bool:
    """Whether several GPUs can make one video of it."""
    return model.networks == 1 and model.budget > 0


def _fit_row(fit: Fit) -> dict:
    return {name: value for name, value in asdict(fit).items() if name not in ("model", "card")}


def main(arguments: list[str] | None = None) -> int:
    from .charts import scale_chart  # matplotlib, which what is counted does not need

    parser = argparse.ArgumentParser(prog="python -m flowcache_core.lab.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/scale"), help="for report.json (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="for the page and plot (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="only writes what tests/lab/test_scale.py holds the counts against")
    options = parser.parse_args(arguments)
    if options.record:
        words = json.dumps({str(case): held_figures(count(case)) for case in HELD}, indent=1) + "\n"
        write_whole(options.record, partial(Path.write_text, data=words, encoding="utf-8"))
        return 0
    report = measure(MODELS, options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    words = json.dumps(report, indent=1)
    write_whole(options.out / "report.json", partial(Path.write_text, data=words, encoding="utf-8"))
    write_whole(options.docs / "scale.md", partial(Path.write_text, data=page(report), encoding="utf-8"))
    scale_chart(report).savefig(options.docs / "scale.png")
    if not report["stock"]:
        print("ComfyUI's own forward is left out: set COMFYUI_PATH to one with a .venv.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
