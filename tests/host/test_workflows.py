"""Every API workflow, posted over HTTP and followed on the websocket to the saved video."""

import json

import numpy as np
import pytest

from tests.helpers.host.videos import check_video
from tests.helpers.host.workflows import API, DEMO, GRAPHS, TITLES, WORKFLOWS

PATIENCE = 1200  # seconds; on a free machine none takes more than one minute


def prompt_of(name: str) -> dict:
    """A workflow with other seeds than a test of the page has run, which the server would answer from its cache."""
    prompt = json.loads((API / f"{name}.json").read_text())
    for each in prompt.values():
        for seed in each["inputs"].keys() & {"seed", "noise_seed"}:
            each["inputs"][seed] += 10
    return prompt


def node(prompt: dict, kind: str) -> str:
    """The id of the only node of a kind."""
    (found,) = [key for key, each in prompt.items() if each["class_type"] == kind]
    return found


def saved(server, prompt: dict, outcome, prefix: str):
    """The video that the save node with this file name prefix wrote."""
    (key,) = [key for key, each in prompt.items() if each["inputs"].get("filename_prefix") == prefix]
    (path,) = server.saved(outcome, key)
    return path


def test_every_workflow_has_an_api_form():
    assert {path.stem for path in API.glob("*.json")} == GRAPHS.keys()
    assert {path.name for path in GRAPHS.values()} == {path.name for path in WORKFLOWS.glob("*.json")}


def test_titles_sort_the_demos_first():
    """And those in their order; the first has the fewest words, by which the page ranks what a search finds."""
    demos = [GRAPHS[name].stem for name in GRAPHS if name.startswith("demo_")]
    assert TITLES[: len(demos)] == demos and all(title.startswith(DEMO) for title in demos)
    assert all(len(title.split()) > len(demos[0].split()) for title in TITLES[1:])


def test_text_to_video(server):
    prompt = prompt_of("demo_text_to_video")
    extend = node(prompt, "FlowCacheAutoregressiveExtend")
    outcome = server.run(prompt, PATIENCE)
    assert outcome.error is None
    check_video(saved(server, prompt, outcome, "flowcache/text_to_video"), 16 * 12 - 3, 256)
    ticks = 64 + 15 * 16  # 16 chunks of 64 steps, each 16 steps ahead of the next
    told = [value for value, most in outcome.progress if most == ticks]
    assert told == sorted(told) and told[-1] == ticks and len(set(told)) > 10
    texts = [text for key, text in outcome.texts if key == extend]
    assert texts and "chunk 16 of 16" in texts[-1]
    (report,) = outcome.outputs[node(prompt, "FlowCacheReport")]["text"]
    assert "16 chunks of 64 steps" in report and "81% of steps reused" in report


def test_two_continuations_of_one_state(server):
    prompt = prompt_of("demo_extend")
    outcome = server.run(prompt, PATIENCE)
    assert outcome.error is None
    beginning = check_video(saved(server, prompt, outcome, "flowcache/extend_beginning"), 8 * 12 - 3, 256)
    first = check_video(saved(server, prompt, outcome, "flowcache/extend_first"), 16 * 12 - 3, 256)
    second = check_video(saved(server, prompt, outcome, "flowcache/extend_second"), 16 * 12 - 3, 256)
    # Coded anew each time, so a little off; the last frames see what comes after them.
    shared = slice(0, 8 * 12 - 12)
    assert difference(beginning[shared], first[shared]) < 2
    assert difference(first[shared], second[shared]) < 2
    assert difference(first[-12:], second[-12:]) > 4 * difference(first[shared], second[shared])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels of 255."""
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())


def test_a_new_caption_computes_only_its_own_continuation(server):
    prompt = prompt_of("demo_extend")
    server.run(prompt, PATIENCE)
    (changed,) = [k for k, each in prompt.items() if each["inputs"].get("caption") == "a white triangle"]
    prompt[changed]["inputs"]["caption"] = "a yellow circle"
    outcome = server.run(prompt, PATIENCE)
    assert outcome.error is None
    extends = [key for key, each in prompt.items() if each["class_type"] == "FlowCacheAutoregressiveExtend"]
    assert len([key for key in extends if key in outcome.executed]) == 1


@pytest.mark.parametrize("preset", ["balanced", "off"])
def test_native_sampler(server, preset):
    prompt = prompt_of("demo_native_sampler")
    prompt[node(prompt, "FlowCache")]["inputs"]["preset"] = preset
    steps = prompt[node(prompt, "BasicScheduler")]["inputs"]["steps"]
    outcome = server.run(prompt, PATIENCE)
    assert outcome.error is None
    check_video(saved(server, prompt, outcome, "flowcache/native_sampler"), 93, 256)
    assert (steps, steps) in outcome.progress or (steps - 1, steps) in outcome.progress
    (report,) = outcome.outputs[node(prompt, "FlowCacheReport")]["text"]
    assert f"8 chunks of {steps} steps, lag {steps}" in report
    assert ("0% of steps reused" in report) == (preset == "off")
