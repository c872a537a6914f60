"""Host tests run in the ComfyUI found at COMFYUI_PATH, else at ~/comfy/ComfyUI; without one they are skipped."""

from pathlib import Path

import pytest

from tests.helpers.host.comfy_server import HOST, Server, host_python
from tests.helpers.host.published import write_published
from tests.helpers.paths import ROOT

FOUND = (HOST / "main.py").exists() and host_python().exists()
HERE = ROOT / "tests" / "host"
CUSTOM_NODES = ROOT / "tests" / "helpers" / "host" / "custom_nodes"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents and not FOUND:
            item.add_marker(pytest.mark.skip(reason="no ComfyUI"))


def pytest_terminal_summary(terminalreporter):
    if not FOUND:
        terminalreporter.write_line(
            "Host tests were SKIPPED: there is no ComfyUI with a .venv at COMFYUI_PATH or ~/comfy/ComfyUI. Clone "
            "ComfyUI there, make a .venv in it with its requirements, and run the tests again."
        )


@pytest.fixture(scope="session")
def published(server):
    """The files that the workflows ask for, small and random."""
    write_published(server.base)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One ComfyUI for all tests of a session."""
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "flowcache_test").symlink_to(CUSTOM_NODES, target_is_directory=True)
    running = Server(base)
    yield running
    running.stop()
