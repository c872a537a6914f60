"""The adapter on pretended paths of Windows: drive letters and back-slashes."""

import pytest

from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.scripts import result_of


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return result_of("run_windows.py", HOST, tmp_path_factory.mktemp("pack"))


def test_a_prefix_with_a_drive_or_back_slashes_stays_in_the_output_folder(found):
    inside = {prefix for prefix, taken in found["prefixes"].items() if taken}
    assert inside == {"FlowCache", "video\\FlowCache", "video/FlowCache", "a\\..\\b", "C:\\ComfyUI\\output\\a"}


def test_folders_of_models_are_listed_as_the_host_names_them(found):
    assert found["whole"] == ["sky"] and found["found"]
