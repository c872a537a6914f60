"""docs/scale.md: what `lab.scale` counted, as tables and words."""

from collections.abc import Iterable, Sequence

from .markdown import markdown
from .roofline import BESIDE, H100, LINK, RTX_4090, assumptions
from .timeline import Way, late

GIB = 2**30
MAIN = (
    "preset", "budget", "steps", "a forward: launches", "TFLOP", "GB", "a tick: launches", "TFLOP", "GB",
    "a cut: launches", "TFLOP", "GB", "share", "a chunk: PFLOP", "in 32 bit", "GB", "4090", "H100",
    "a minute: PFLOP", "4090", "reads", "memory, GiB",
)  # fmt: skip


def page(report: dict) -> str:
    """Writes the whole page."""
    parts = [
        "# At real size",
        _introduction(report),
        "![Where a chunk's time goes](scale.png)",
        "## What counts",
        WHAT_COUNTS,
        "## Every model, every preset",
        _legend(),
        *_main(report["rows"]),
        "## Beside ComfyUI's own forward",
        _stock(report),
        *_decode(report),
        "## Memory",
        _memory(report),
        *_goals(report["rows"]),
        "## What fits",
        _fits(report),
        "## One video over several GPUs",
        _gpus(report["gpus"]),
        "## What the estimates stand on",
        f"{assumptions()} Weights and history that live in system memory come at {LINK / 1e9:.0f} GB/s. No figure on "
        "this page was measured on a GPU.",
    ]
    return "\n\n".join(parts) + "\n"


WHAT_COUNTS = """\
Counted on tensors with the real shapes and no data, with the engine's own code, so that the figures are the same on
every machine. A test holds them (`tests/lab/test_scale.py`): more launches, bytes or operations than were recorded
fail, with what grew.

- **A launch** is a call of one of torch's operations that computes: neither a view nor an allocation. Attention, RMS
  norm and a fused rotary product are one each. A layer norm whose input does not lie in order copies it first: that is
  one more.
- **FLOP** are those of matrix products and attention, two a multiply-add; no model here has products in 8 bit.
- **GB** are bytes of elementwise work and copies, distinct elements read and written; those of products and attention
  come on top.
- **A forward** is one chunk through the network once. Branches of guidance that go through in one batch (SkyReels-V2:
  two) count as one; MAGI-1 runs its branches one after another, so there each is one. Figures are means over a minute
  of video.
- **A tick** is the mean one in the middle of a run; **a cut** is all layers and branches; **a chunk** is a minute's
  work over its chunks.
- **Reads** are numbers that the host waits for, a chunk.
- Only what is in steady use counts: one lag in the middle of a run, in which a chunk begins and a chunk becomes clean.
  What chunks see of the past is added up over the whole minute. Text encoder, decoder and saving are left out,
  and what encodes LongVie 2's pictures. Of the two networks of Wan 2.2 A14B a step runs one, a clean pass both."""


def _introduction(report: dict) -> str:
    lines = []
    for model in _models(report["rows"]):
        plain = _row(report, model, "plain", bounded=False)
        asked = (("balanced", True), ("plain", True), ("balanced", False))
        best = next(found for preset, bounded in asked if (found := _row(report, model, preset, bounded)))
        assert plain
        cut = f", of which the cut takes {_share(best):.1%}" if best["budget"] else ""
        lines.append(
            f"- {_title(model)}: a plain chunk takes at least {_time(plain['chunk']['seconds'][RTX_4090.name])} on an "
            f"RTX 4090; {_named(best)} {_time(best['chunk']['seconds'][RTX_4090.name])}{cut}."
        )
    return (
        "What runs of the models that people use ask of a GPU: `make scale` counts it in minutes, without one, and "
        "writes this page and `out/scale/report.json`, which has every figure. Times are estimates by the roofline "
        "(last section).\n\n" + "\n".join(lines)
    )


def _legend() -> str:
    return (
        "A budget is in clean chunks; *steps* are those of a chunk that are recomputed. *Share* is the cut's of its "
        f"chunk's time on an {RTX_4090.name}. *4090* and *H100* are the least seconds a chunk (minutes a minute of "
        "video) by the roofline. *Memory* is all beside the weights: history, texts' keys and values, tables, "
        "activations at their peak."
    )


def _main(rows: Sequence[dict]) -> Iterable[str]:
    for model in _models(rows):
        mine = [row for row in rows if _model(row) == model]
        first = mine[0]
        yield (
            f"**{_title(model)}**: {first['steps']} steps, {first['chunks_a_minute']} chunks a minute, weights "
            f"{first['memory']['weights'] / GIB:.1f} GiB in bf16"
            + ("" if len(mine) > 2 else "; every preset recomputes all of so few steps")
        )
        yield markdown(MAIN, [_cells(row) for row in mine])


def _cells(row: dict) -> list[str]:
    forward, tick, cut, chunk, minute = (row[name] for name in ("forward", "tick", "cut", "chunk", "minute"))
    beside = sum(size for name, size in row["memory"].items() if name != "weights")
    return [
        row["preset"],
        _budget(row),
        f"{row['recomputed']}",
        *_three(forward),
        *_three(tick),
        *(_three(cut) if cut["launches"] else ("", "", "")),
        f"{_share(row):.1%}" if cut["launches"] else "",
        _number(chunk["flops"] / 1e15),
        f"{chunk['flops_by_bits'].get('32', 0) / chunk['flops']:.1%}",
        _number(chunk["bytes"] / 1e9),
        *(_number(chunk["seconds"][card.name]) for card in (RTX_4090, H100)),
        _number(minute["flops"] / 1e15),
        _number(minute["seconds"][RTX_4090.name] / 60),
        f"{chunk['read_backs']:.0f}",
        _number(beside / GIB),
    ]


def _three(work: dict) -> tuple[str, str, str]:
    return f"{work['launches']:,.0f}", _number(work["flops"] / 1e12), _number(work["bytes"] / 1e9)


def _stock(report: dict) -> str:
    if not report["stock"]:
        return "No ComfyUI was found when this was written: set COMFYUI_PATH to one with a `.venv`."
    cells = []
    for stock in report["stock"]:
        ours = _row(report, _model(stock), "plain", bounded=False)
        assert ours
        theirs, mine = stock["forward"], ours["forward"]
        theirs_beside, ours_beside = (
            work["seconds"][RTX_4090.name] - (0 if work is theirs else _past_seconds(work)) for work in (theirs, mine)
        )
        cells.append(
            [
                _title(_model(stock)),
                f"{theirs['launches'] + ours['layers']:,.0f}",
                f"{mine['launches']:,.0f}",
                f"{ours['launches_a_layer']:.1f}",
                _number(theirs["bytes"] / 1e9),
                _number(mine["bytes"] / 1e9),
                _number(1000 * theirs_beside),
                _number(1000 * ours_beside),
                f"{ours_beside / theirs_beside:.2f}x",
            ]
        )
    names = (
        "model",
        "launches: stock",
        "ours",
        "ours a layer",
        "GB: stock",
        "ours",
        "ms on a 4090: stock",
        "ours",
        "ratio",
    )
    return (
        "WanModel and CausalWanModel (Self-Forcing) with the same weights, on one chunk with all branches of guidance. "
        "Attention over the history costs the same in both: it counts as a launch a layer, and not in the times. Stock "
        "has a fused rotary product and makes the text's keys anew in every WanModel forward.\n\n"
        + markdown(names, cells)
    )


def _past_seconds(work: dict) -> float:
    """Attention's time but the text's, which is a few percent of it at most."""
    return work["past_seconds"][RTX_4090.name]


def _decode(report: dict) -> list[str]:
    """How much later a chunk is there because the one before it is decoded; nothing without a ComfyUI, whose VAE it
    is."""
    cells = []
    for stock in report["stock"]:
        quick = _row(report, _model(stock), "balanced", bounded=True)
        row = quick or _row(report, _model(stock), "plain", bounded=True)
        assert row
        for card in (RTX_4090, H100):
            chunk, tick, decode = (work["seconds"][card.name] for work in (row["chunk"], row["tick"], stock["decode"]))
            ways: tuple[Way, ...] = ("in order", "host waits", "beside")
            delays = [late(tick, round(chunk / tick), decode, way) for way in ways]
            cells.append(
                [_title(_model(stock)), row["preset"], card.name, *map(_number, (chunk, tick, decode, *delays))]
            )
    if not cells:
        return []
    names = ("model", "preset", "card", "a chunk", "a tick", "its decode", "in order", "the host waits", "beside")
    words = (
        "Seconds by the roofline, with a budget, and with ComfyUI's Wan VAE. The last three: how much later each chunk "
        "is there because the one before it is decoded and written while the run goes on. *In order*: by the network's "
        "own stream. *The host waits*: on a stream of its own, and nothing is given to the network before it is done, "
        "as it was at first. *Beside*: nothing waits, which is what the node's *overlap* does "
        "(`tests/host/test_decoders.py`). The streams do not slow each other down here; a card that one of them fills "
        "shares its time, whatever the order. Stream Video to Disk takes ComfyUI's small decoders (TAE) too."
    )
    return ["## Decoding while the run goes on", words + "\n\n" + markdown(names, cells)]


def _memory(report: dict) -> str:
    names = ("model", "preset", "budget", "history", "texts and tables", "activations", "weights in bf16")
    cells = []
    for row in report["rows"]:
        if row["preset"] in ("plain", "balanced"):
            sizes = row["memory"]
            order = ("history", "texts_and_tables", "activations", "weights")
            cells.append(
                [_title(_model(row)), row["preset"], _budget(row), *(_number(sizes[name] / GIB) for name in order)]
            )
    published = [
        [_title(_model(row)), row["preset"], _budget(row), _number(row["history"] / GIB)]
        for row in report["published_rules"]
        if row["preset"] == "paper slow"
    ]
    return (
        "GiB for a minute of video. With a budget the keys of active chunks need room in one layer alone.\n\n"
        + markdown(names, cells)
        + "\n\nThe published thresholds let every chunk recompute on ticks of its own, so active chunks keep their "
        "keys in every layer (planned; how often they recompute depends on the video: their work is not counted):\n\n"
        + markdown(("model", "preset", "budget", "history"), published)
    )


def _goals(rows: Sequence[dict]) -> list[str]:
    """What was to be reached: as it was counted before, the goal, and what the rows say now; nothing where one of them
    is missing."""
    named = {(row["model"], row["preset"], row["budget"] is not None): row for row in rows}
    asked = (
        ("Self-Forcing 1.3B", "plain", True),
        ("SkyReels-V2 1.3B", "balanced", True),
        ("Self-Forcing 1.3B", "plain", False),
        ("MAGI-1 4.5B", "plain", False),
    )
    if not all(key in named for key in asked):
        return []
    causal, skyreels, plain, magi = (named[key] for key in asked)

    def cut(row: dict) -> str:
        return f"{row['cut']['launches']:,.0f} launches, {_share(row):.1%}"

    wide = magi["chunk"]["flops_by_bits"].get("32", 0) / magi["chunk"]["flops"]
    cells = [
        ["a cut, Self-Forcing 1.3B", "120,000 launches, 16.1%", "2,000 launches, 2% of its chunk", cut(causal)],
        ["a cut, SkyReels-V2 1.3B", "830,000 launches", "5,000 launches, 2% of its chunk", cut(skyreels)],
        ["kernels a layer, Self-Forcing 1.3B", "47.5", "32", f"{plain['launches_a_layer']:.1f}"],
        [
            "elementwise bytes of a forward, Self-Forcing 1.3B",
            "39.6 GB",
            "21 GB",
            f"{plain['forward']['bytes'] / 1e9:.1f} GB",
        ],
        ["float32 share of MAGI-1 4.5B's work", "15.6 of a forward's 99 TFLOP", "none", f"{wide:.1%}"],
    ]
    words = (
        "Before: as counted on version 0.1.0.\n\n"
        + markdown(("what", "before", "goal", "now"), cells)
        + "\n\nHeld by tests: the layers that ComfyUI's fp8 product takes are those of its own forward "
        "(`tests/host/test_kernels.py`); memory asked of ComfyUI is 1.0 to 1.15 of what is used, texts included "
        "(`tests/lab/test_scale.py`)."
    )
    return ["## Before and now", words]


def _fits(report: dict) -> str:
    names = (
        "model", "card", "weights", "preset", "budget", "history", "lives in", "GiB used", "seconds a chunk",
        "whole history up to", "in int8", "in int4",
    )  # fmt: skip
    cells = []
    for row in report["fits"]:
        start = [_title(_model(row)), f"{row['memory']} GB ({row['card']})"]
        if not row["fits"]:
            cells.append([*start, f"does not fit: {row['least']:.1f} GiB at least", *[""] * 9])
            continue
        whole = row["seconds_whole"]
        cells.append(
            [
                *start,
                row["weights"],
                row["preset"],
                "–" if row["budget"] is None else str(row["budget"]),
                row["history"],
                row["place"],
                f"{row['gigabytes']:.1f}",
                _number(row["seconds"]),
                *(["any length", "", ""] if whole is None else [f"{seconds:.0f} s" for seconds in whole.values()]),
            ]
        )
    return (
        "The first that fits of: history on the card, then in system memory; of these, weights in bf16, then fp8, then "
        "fp8 *streamed*, two layers of them on the card and the rest in system memory, as ComfyUI does when they do "
        "not fit; of these, the largest budget up to the one above. Each runs a video of any length. *Whole history "
        "up to* is the length of a video that fits beside the same weights without a budget, stored as computed, in 8 "
        "and in 4 bits; with a budget that is so much smaller, too. MAGI-1 keeps what its "
        "chunks look back on and Krea Realtime its 3 frames, and LongVie 2 keeps no history, so they need no "
        "budget. LongLive has the windows that it is published with. "
        f"{BESIDE:.0f} GiB is set aside for CUDA and the desktop.\n\n" + markdown(names, cells)
    )


def _gpus(rows: Sequence[dict]) -> str:
    links = list(rows[0]["speed"])
    cells = []
    for row in rows:
        if row["gpus"] == 1:
            continue
        speeds = [f"{row['speed'][link]:.1f}x" for link in links]
        sent = f"{row['sent'] / 1e6:,.0f} MB"
        cells.append([_title(_model(row)), row["scheme"], str(row["gpus"]), sent, f"{row['history']:.0%}", *speeds])
    return (
        "Bytes that the busiest GPU sends in a tick that recomputes everything (tests hold `parallel/` to this count "
        "to the byte), the share of the history that the fullest holds, and how many times as fast as one H100 that "
        "may be over NVLink (360 GB/s each way), PCIe 4.0 (20 GB/s) and 10 GbE (1.1 GB/s). Nothing is hidden behind "
        "work in the estimate. [How to run it](scale-out.md).\n\n"
        + markdown(("model", "scheme", "GPUs", "sent a tick", "history", *links), cells)
    )


def _model(row: dict) -> tuple:
    return row["model"], *row["size"]


def _models(rows: Sequence[dict]) -> list[tuple]:
    return list(dict.fromkeys(map(_model, rows)))


def _title(model: tuple) -> str:
    name, width, height = model
    return f"{name} {width}x{height}"


def _row(report: dict, model: tuple, preset: str, bounded: bool) -> dict | None:
    for row in report["rows"]:
        if (_model(row), row["preset"], row["budget"] is not None) == (model, preset, bounded):
            return row
    return None


def _named(row: dict) -> str:
    words = [] if row["preset"] == "plain" else [f"`{row['preset']}`"]
    return " ".join([*words, *([f"with a budget of {row['budget']}"] if row["budget"] else [])])


def _budget(row: dict) -> str:
    return "–" if row["budget"] is None else str(row["budget"])


def _share(row: dict) -> float:
    return row["cut"]["seconds"][RTX_4090.name] / row["chunk"]["seconds"][RTX_4090.name]


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
