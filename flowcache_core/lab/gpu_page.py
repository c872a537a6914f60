"""What `lab.gpu` measured, as a page."""

from collections.abc import Sequence

from .markdown import markdown

GIB = 2**30
CUT_SHARE, COMPILED, OF_FORWARDS, FASTER, OFF_PLAN = 0.02, 0.85, 0.95, 6.0, 0.05  # wanted on a card


def page(report: dict) -> str:
    """Writes the whole page."""
    told = report["parts"]
    sections = ["# On a card", _machine(report), *_checks(told["correct"]["found"])]
    for name, part in told.items():
        if name.startswith("fast: ") and part["found"]:
            sections += [f"## {name.removeprefix('fast: ')}", _timings(part["found"]), _verdicts(part["found"])]
    sections += _whole(told["whole run"]["found"])
    errors = [f"- {name}: {part['error']}" for name, part in told.items() if part["error"]]
    sections += ["## What failed", "\n".join(errors)] if errors else []
    return "\n\n".join(sections) + "\n"


def _machine(report: dict) -> str:
    machine = report["machine"]
    card = f"{machine['card']}, {machine['card_gib']} GiB, CUDA {machine['cuda']}" if machine["card"] else "No card"
    toy = " A toy run: it shows that the script works, and no speed." if report["toy"] else ""
    return (
        f"{card}; torch {machine['torch']}, Python {machine['python']}. Random weights; a few ticks in the middle of a "
        f"run are timed, a chunk is worked out from them.{toy}"
    )


def _checks(found: Sequence[dict]) -> list[str]:
    if not found:
        return []
    rows = [[check["name"], check["found"], "yes" if check["holds"] else "**no**"] for check in found]
    return ["## Correct", markdown(("what", "found", "holds"), rows)]


def _timings(found: Sequence[dict]) -> str:
    names = (
        "setting", "a forward, ms", "a tick, ms", "a cut, ms", "share of its chunk", "a chunk, s", "peak, GiB",
        "planned, GiB", "device busy", "launches a tick", "counted",
    )  # fmt: skip
    return markdown(names, [_timing(one) for one in found])


def _timing(one: dict) -> list[str]:
    return [
        one["setting"],
        f"{1000 * one['forward']:.1f}",
        f"{1000 * one['tick']:.1f}",
        f"{1000 * one['cut']:.2f}",
        f"{_share(one['cut'], one['chunk']):.1%}",
        f"{one['chunk']:.2f}",
        f"{one['peak'] / GIB:.2f}",
        f"{one['planned'] / GIB:.2f}",
        "" if one["busy"] is None else f"{one['busy']:.0%}",
        "" if one["launches"] is None else f"{one['launches']:,}",
        "" if one["counted"] is None else f"{one['counted']:,}",
    ]


def _verdicts(found: Sequence[dict]) -> str:
    """Beside what is wanted on a card."""
    by_name = {one["setting"]: one for one in found}
    lines = []
    cuts = [one for one in found if one["cut"]]
    if cuts:
        worst = max(_share(one["cut"], one["chunk"]) for one in cuts)
        lines.append(f"- A cut takes {worst:.1%} of its chunk at most (wanted: {CUT_SHARE:.0%}).")
    plain, compiled = by_name.get("plain, budget"), by_name.get("plain, budget, compiled")
    if plain and plain.get("stock"):
        ratio, theirs = plain["forward"] / plain["stock"], 1000 * plain["stock"]
        lines.append(
            f"- ComfyUI's own forward takes {theirs:.1f} ms: a plain one of ours {ratio:.2f}x (wanted: 1.00x)."
        )
    if plain and compiled:
        ratio = compiled["forward"] / plain["forward"]
        lines.append(f"- Compiled a forward takes {ratio:.2f} of its time (wanted: {COMPILED}).")
    peaks = [one for one in found if one["peak"]]
    if peaks:
        worst = max((one["planned"] / one["peak"] - 1 for one in peaks), key=abs)
        lines.append(f"- Planned memory is off by {worst:+.0%} at most (wanted: {OFF_PLAN:.0%}).")
    return "\n".join(lines)


def _whole(found: Sequence[dict]) -> list[str]:
    if not found:
        return []
    rows = [
        [one["model"], one["preset"], f"{one['seconds']:.1f}", f"{one['forwards']:,}", f"{one['ticks']} of {one['of']}"]
        for one in found
    ]
    sections = ["## A whole run", markdown(("model", "preset", "seconds", "forwards", "ticks"), rows)]
    if len(found) == 2 and all(one["ticks"] == one["of"] for one in found):
        ours, plain = found
        faster, fewer = plain["seconds"] / ours["seconds"], plain["forwards"] / ours["forwards"]
        sections.append(
            f"{faster:.2f}x faster by the clock (wanted: {FASTER:g}x), {fewer:.2f}x fewer forwards: "
            f"{faster / fewer:.0%} of that ratio (wanted: {OF_FORWARDS:.0%})."
        )
    return sections


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
