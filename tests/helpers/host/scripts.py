"""Scripts of tests/host/ that run in a host's Python and print what they found."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.host.comfy_server import PACK, host_python
from tests.helpers.paths import ROOT


def result_of(script: str, host: Path, folder: Path) -> dict:
    """Runs `script host pack` in the Python of the ComfyUI at `host`; gives what it prints as JSON behind "RESULT ".

    Args:
        folder: for a link to the pack, by a name that an import takes.
    """
    if not (host / "main.py").exists():
        pytest.skip(f"no ComfyUI at {host}")
    link = folder / "flowcache_pack"
    link.symlink_to(PACK, target_is_directory=True)
    command = [str(host_python(host)), str(ROOT / "tests" / "host" / script), str(host), str(link)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
