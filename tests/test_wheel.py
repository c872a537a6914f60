"""`pip install .` brings the engine alone, and it runs away from the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

LEFT_OUT = (".*", "out", "build", "*.egg-info", "__pycache__", "golden", "docs", "workflows")  # large, or made here
DATA = {"network.safetensors", "vae.safetensors", "network.flowcache.json", "MODEL_CARD.md"}
PLACE = """
import flowcache_core
from flowcache_core.demo.vae import load_vae
load_vae()
print(flowcache_core.__file__)
"""


def run(*command: str | Path, **options) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-2000:]
    return ran.stdout


def builds_here() -> bool:
    """Whether this Python has what builds a wheel; pip fetches it otherwise."""
    try:
        major, minor, *_ = metadata.version("setuptools").split(".")
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (70, 1)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    how = ["--no-deps", "--no-cache-dir", *(["--no-build-isolation"] if builds_here() else [])]
    run(sys.executable, "-m", "pip", "wheel", *how, "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_engine_with_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    package, version, *_ = wheel.name.split("-")
    assert {name.split("/")[0] for name in names} == {"flowcache_core", f"{package}-{version}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "flowcache_core").rglob("*.py")}
    data = {f"flowcache_core/demo/{name}" for name in DATA}
    assert {name for name in names if ".dist-info/" not in name} == sources | data


def test_it_asks_for_no_torch_of_its_own(wheel):
    """ComfyUI's torch is built for the user's card."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith("dist-info/METADATA"))
        needed = [line for line in file.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    assert any("torch" in line for line in needed)
    assert all("extra ==" in line for line in needed if "torch" in line)


def test_it_runs_from_a_folder_outside_the_repository(wheel, tmp_path):
    """Libraries are borrowed from this Python, the engine is not."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    offline = ["--no-deps", "--no-index", "--no-compile"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "borrowed.pth").write_text("\n".join(libraries))
    away = {"cwd": tmp_path, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}
    assert "generate" in run(python, "-m", "flowcache_core", "--help", **away)
    assert Path(run(python, "-c", PLACE, **away).strip()).is_relative_to(own)
