"""Workflows of earlier versions go on working: their API forms are accepted, and those of the demo model run."""

import json

import pytest

from tests.helpers.host.node_texts import inputs_of
from tests.host.store_release import RELEASED

STORED = sorted(RELEASED.glob("*/api/*.json"))
NEWEST = STORED[-1].parts[-3]  # whose demos are those that the other tests run
names = pytest.mark.parametrize("file", STORED, ids=lambda file: f"{file.parts[-3]} {file.stem}")


def test_something_is_stored():
    assert STORED


@names
def test_nodes_and_inputs_are_still_there(server, published, file):
    known = server.get("/object_info")
    for node in json.loads(file.read_text()).values():
        kind = node["class_type"]
        assert kind in known, f"{kind} is gone"
        gone = node["inputs"].keys() - inputs_of(known[kind]).keys()
        assert not gone, f"{kind} has lost {', '.join(sorted(gone))}"
        missing = known[kind]["input"].get("required", {}).keys() - node["inputs"].keys()
        assert not missing, f"{kind} demands {', '.join(sorted(missing))}, which older graphs do not have"


@pytest.mark.parametrize(
    "file",
    [file for file in STORED if file.stem.startswith("demo_") and file.parts[-3] != NEWEST],
    ids=lambda file: f"{file.parts[-3]} {file.stem}",
)
def test_demo_runs(server, file):
    prompt = json.loads(file.read_text())
    for node in prompt.values():
        for name, least in (("chunks", 2), ("length", 21)):
            if name in node["inputs"]:
                node["inputs"][name] = least
    outcome = server.run(prompt)
    assert outcome.error is None
    saves = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert all(path.stat().st_size > 0 for key in saves for path in server.saved(outcome, key))
