"""For every input of a node, by what the server says of it, values that it cannot mean and some at its very edge."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

PATHS = ("../out", "/tmp/out", "a/../../out", "~/../../out", "nul\0name", 400 * "n", "a lone \ud800", "a/b:c")
TEXTS = (
    "", "no schedule", "5-2: a red circle", "0: a | b *", "0: a *nan", "0: a *-1 | b *1", "0: a *1e999",
    f"{10**30}-: a red circle", "0-5: a red circle\n3-: a blue square", "\ud800", "a " * 5000,
)  # fmt: skip
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING")
FOREIGN = (None, "text", 5, {}, {"__value__": [1, 2, 3]})  # where a link belongs


@dataclass(frozen=True)
class Wrong:
    """An input's value in a prompt.

    Attributes:
        name: of the input.
        value: as it is posted, where no `link` takes its place.
        link: name of an object of `custom_nodes/wrong_objects.py`.
        widget: the input has one.
        may_run: it is at the edge of what the input means: it may run, or fail with a clear line.
    """

    name: str
    value: object = None
    link: str = ""
    widget: bool = False
    may_run: bool = False

    def __str__(self) -> str:
        return f"{self.name} = {self.link or repr(self.value)[:60]}"


def widgets(info: dict, draw: random.Random) -> Iterator[Wrong]:
    """Of each widget values out of its range, of other types, and its limits."""
    for name, (kind, more) in inputs(info):
        if kind == "COMBO" or isinstance(kind, list):
            for value in (None, {}, "", 7, True, math.nan, {"__value__": [1, 2]}, 9999 * "x", *PATHS[:3]):
                yield Wrong(name, value)
        elif kind in ("INT", "FLOAT"):
            low, high = more["min"], more["max"]
            below, above = (max(1, abs(limit)) * draw.choice((1, 1e6, 1e30)) for limit in (low, high))
            for value in (low - below, high + above, math.inf, -math.inf, "1e999", math.nan, None, {}, "", "text", [1]):
                yield Wrong(name, value)
            edge = high if high > 2**32 else low + 1 if low <= 0 else low  # 0 often stands for "as usual"
            yield Wrong(name, edge, may_run=True)
        elif kind == "STRING":
            for value in (*PATHS, *TEXTS):
                yield Wrong(name, value, may_run=True)


def links(info: dict, objects: list[str]) -> Iterator[Wrong]:
    """Of each input linked objects of its type with the wrong shape or content, one of another type; of each that has
    no widget, values in its place."""
    kinds = sorted({one.split(": ")[0] for one in objects})
    for name, (kind, _) in inputs(info):
        if kind in kinds:
            mine = [one for one in objects if one.startswith(f"{kind}: ")]
            other = next(one for one in objects if one.startswith(kinds[kinds.index(kind) - 1]))
            optional = name in info["input"].get("optional", {})
            if kind not in WIDGETS:
                yield from (Wrong(name, value, may_run=value is None and optional) for value in FOREIGN)
            yield from (Wrong(name, link=one, widget=kind in WIDGETS) for one in [*mine, other])


def inputs(info: dict) -> Iterator[tuple[str, tuple]]:
    """Name, type and options of each, by the server's /object_info."""
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})
