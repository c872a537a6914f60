"""The host's MultiGPU CFG Split: branches of guidance divided among devices, each with a network of its own."""

import pytest

from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.scripts import result_of

KINDS = ("causal", "causal, budget", "rolling", "joint")  # how chunks see each other


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return result_of("run_several_devices.py", HOST, tmp_path_factory.mktemp("pack"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_runs_its_own_branch_on_its_own_network(found, kind):
    runs = found[kind]
    assert len(runs["shares"]) == 10 and runs["mixed"] == 0
    assert all(first == second > 0 for first, second in runs["shares"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_video_is_that_of_one_device(found, kind):
    assert found[kind]["apart"] < 2e-3  # one row at a time rounds otherwise than two
