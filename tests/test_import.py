"""Importing the pack: no network, no write, nothing heavy, harmless without ComfyUI."""

import ast
import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT as PACK

DRIVERS = {  # of the ComfyUI whose address they are given, or that they have started
    PACK / "flowcache_core" / "lab" / "comfy.py",
    PACK / "flowcache_core" / "batch" / "host.py",
}
SOURCES = [PACK / "__init__.py", *(PACK / "nodes").rglob("*.py"), *(PACK / "flowcache_core").rglob("*.py")]
NETWORK = (
    "socket",
    "ssl",
    "http",
    "urllib.request",
    "requests",
    "aiohttp",
    "httpx",
    "ftplib",
    "smtplib",
    "huggingface_hub",
)
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "av",
    "scipy",
    "sympy",
    "matplotlib",
)  # slow to import, and not always needed

WATCH = """
import importlib.util, json, sys
import numpy, PIL.Image, safetensors.torch, torch
before = set(sys.modules)

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
    if writes or event.startswith(("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "tempfile.")):
        raise AssertionError(f"{event} {args}")

sys.addaudithook(watch)
"""
ALL = """
import importlib, pkgutil
import flowcache_core
for module in pkgutil.walk_packages(flowcache_core.__path__, "flowcache_core."):
    name = module.name.rpartition(".")[2]
    if not name.startswith(("__main__", "train_", "on_ray", "sharding")):  # programs, and what is imported when asked
        importlib.import_module(module.name)
"""
ALONE = """
spec = importlib.util.spec_from_file_location("flowcache", "__init__.py", submodule_search_locations=["."])
pack = importlib.util.module_from_spec(spec)
sys.modules["flowcache"] = pack
spec.loader.exec_module(pack)
assert not hasattr(pack, "comfy_entrypoint")
"""


def imported(program: str) -> set[str]:
    """Runs a program that must neither write nor reach for the network; the modules that it brought in."""
    program = WATCH + program + "\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    ran = subprocess.run([sys.executable, "-B", "-c", program], cwd=PACK, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_all_of_the_engine_neither_writes_nor_reaches_for_the_network():
    modules = imported(ALL)
    assert "flowcache_core.engine.loop" in modules
    assert not modules & {*NETWORK, *HEAVY}


def test_one_process_alone_imports_neither_ray_nor_what_divides_a_run():
    modules = imported("import flowcache_core.__main__, flowcache_core.generation")
    assert not {name for name in modules if name == "ray" or name.startswith("flowcache_core.parallel.")}


def test_without_comfyui_the_pack_does_nothing():
    assert not {name for name in imported(ALONE) if "nodes" in name or name in (*NETWORK, *HEAVY)}


@pytest.mark.parametrize(
    "program", ["open('written', 'w')", "import socket; socket.socket().connect(('127.0.0.1', 9))"]
)
def test_a_write_or_a_connection_would_be_noticed(program):
    with pytest.raises(AssertionError):
        imported(program)


@pytest.mark.parametrize("source", sorted({*SOURCES} - DRIVERS), ids=lambda path: str(path.relative_to(PACK)))
def test_no_module_uses_the_network(source):
    """Not even later: every import statement is looked at, those inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert not [name for name in names if name in NETWORK or name.split(".")[0] in NETWORK]


@pytest.mark.parametrize(
    "source", [path for path in SOURCES if path.parent.name != "lab"], ids=lambda path: str(path.relative_to(PACK))
)
def test_only_the_lab_needs_the_lab(source):
    """Neither its modules nor what draws its charts, which nobody installs for the nodes."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    assert not names & {"lab", "matplotlib", "skimage"}
