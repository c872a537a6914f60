"""The drawing in docs/map.md shows the imports between rooms as they are, and none of them goes round in a circle."""

import ast
import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

HOST = {"comfy", "comfy_extras", "execution", "folder_paths", "latent_preview", "nodes", "server"}  # ComfyUI's modules
COMFY_API = "comfy_api"  # what ComfyUI promises to keep
FILES = [path.relative_to(ROOT) for part in ("flowcache_core", "nodes") for path in (ROOT / part).rglob("*.py")]


def name_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(name: str) -> tuple[set[str], set[str]]:
    """What a module imports anywhere, in functions and for type checkers too: modules of ours; packages of others."""
    package = MODULES[name].parent.parts
    ours, others = set(), set()
    for node in ast.walk(ast.parse((ROOT / MODULES[name]).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                module = ".".join([*base, alias.name])
                ours.add(module if module in MODULES else ".".join(base))
        elif isinstance(node, ast.ImportFrom):
            others.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours - {name}, others


IMPORTS = {name: imports(name) for name in MODULES}


def room_of(module: str) -> str:
    """A folder with a slash behind it, or a file at the root of flowcache_core."""
    file = MODULES[module]
    if file.parts[0] == "nodes":
        return f"{file.parent}/"
    inside = file.relative_to("flowcache_core")
    return inside.name if inside.parent == Path(".") else f"{inside.parent.as_posix()}/"


def code_arrows() -> set[tuple[str, str]]:
    pairs = {(room_of(name), room_of(module)) for name, (ours, _) in IMPORTS.items() for module in ours}
    return {(start, end) for start, end in pairs if start != end}


def drawing() -> tuple[set[str], set[tuple[str, str]]]:
    """Rooms, by the first line of their labels, and arrows."""
    (drawn,) = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "map.md").read_text(encoding="utf-8"), re.DOTALL)
    labels = dict(re.findall(r'^ +(\w+)\["(.*?)<br>.*"\]$', drawn, re.MULTILINE))
    arrows = re.findall(r"^ +(\w+) --> (\w+)$", drawn, re.MULTILINE)
    assert drawn.count("-->") == len(arrows) == len({*arrows})
    return {*labels.values()}, {(labels[start], labels[end]) for start, end in arrows}


def reached(arrows: set[tuple[str, str]], start: str) -> set[str]:
    """All that arrows lead on to."""
    found, ahead = set(), {start}
    while ahead:
        found |= ahead
        ahead = {end for begin, end in arrows if begin in ahead} - found
    return found - {start}


def circle(needs: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_drawing_has_every_room():
    assert drawing()[0] == {room_of(name) for name in MODULES} - {"__init__.py"}


def test_every_arrow_is_an_import():
    assert drawing()[1] - code_arrows() == set()


def test_every_import_follows_the_arrows():
    _, arrows = drawing()
    assert {(start, end) for start, end in code_arrows() if end not in reached(arrows, start)} == set()


def test_every_arrow_is_needed():
    """None repeats what others already lead to."""
    _, arrows = drawing()
    assert {(start, end) for start, end in arrows if end in reached(arrows - {(start, end)}, start)} == set()


def test_no_circle_between_rooms():
    arrows = code_arrows()
    assert circle({room: {end for start, end in arrows if start == room} for room, _ in arrows}) == []


def test_no_circle_between_modules():
    assert circle({name: ours for name, (ours, _) in IMPORTS.items()}) == []


def test_a_circle_would_be_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]})


def test_nothing_needs_the_lab():
    assert {start for start, end in code_arrows() if end == "lab/"} == set()


def test_the_engine_knows_neither_nodes_nor_comfyui():
    for name in MODULES:
        ours, others = IMPORTS[name]
        if name.startswith("flowcache_core"):
            assert not [module for module in ours if module.startswith("nodes")], name
            assert not others & {*HOST, COMFY_API}, name


def test_node_definitions_know_comfyui_by_its_api_alone():
    """The adapter does the rest. A plain `import nodes` is ComfyUI's module of that name."""
    definitions = [name for name in MODULES if room_of(name) == "nodes/"]
    assert len(definitions) > 10
    assert {name: IMPORTS[name][1] & HOST for name in definitions} == dict.fromkeys(definitions, set())


def test_the_adapter_does_not_need_the_definitions():
    assert ("nodes/comfyui/", "nodes/") not in code_arrows()


@pytest.mark.parametrize("told", sorted({*re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "map.md").read_text())}))
def test_files_that_the_map_names_are_there(told):
    folders = ("", "flowcache_core", "flowcache_core/engine", "nodes/comfyui")  # "there", says the map, or lists them
    assert any((ROOT / folder / told).is_file() for folder in folders)
