"""What the page is told about the nodes."""

import pytest

from tests.helpers.host.workflows import TITLES

NODES = [
    "FlowCacheLoadARVideoModel",
    "FlowCacheLoadDemoVAE",
    "FlowCacheLoadMagiVAE",
    "FlowCacheDemoPrompt",
    "FlowCacheMagiPrompt",
    "FlowCache",
    "FlowCacheAutoregressiveExtend",
    "FlowCacheARSampler",
    "FlowCacheReport",
    "FlowCachePromptsOverTime",
    "FlowCacheStreamVideo",
    "FlowCacheResume",
    "FlowCacheSaveState",
    "FlowCacheLoadState",
    "FlowCacheCompareVideos",
    "FlowCacheReadVideo",
    "FlowCacheSaveVideo",
]


@pytest.fixture(scope="module")
def told(server) -> dict:
    return server.get("/object_info")


def test_every_node_is_there_with_a_description(told):
    for name in NODES:
        assert told[name]["description"] and told[name]["category"].startswith("FlowCache")


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip_and_a_safe_range(told, name):
    inputs = told[name]["input"]
    for key, (kind, options, *_) in [*inputs.get("required", {}).items(), *inputs.get("optional", {}).items()]:
        if kind != "MODEL" or name == "FlowCache":
            assert options.get("tooltip"), key
        if kind in ("INT", "FLOAT"):
            assert options["min"] < options["max"] and options["min"] <= options["default"] <= options["max"], key


def test_every_prompt_takes_the_pages_choices(told):
    """{red|blue}, as in the host's own prompts; names of files take none."""
    host = told["CLIPTextEncode"]["input"]["required"]["text"][1]
    texts = {
        (name, key): more[0]
        for name in NODES
        for held in told[name]["input"].values()
        for key, (kind, *more) in (held.items() if isinstance(held, dict) else ())
        if kind == "STRING" and "prefix" not in key
    }
    assert host["dynamicPrompts"] and len(texts) == 3
    assert all(options["dynamicPrompts"] for options in texts.values()), texts


def test_rarely_needed_inputs_are_folded_away_and_optional(told):
    inputs = told["FlowCache"]["input"]
    assert set(inputs["required"]) == {"model", "preset", "history_budget"}
    assert all(options["advanced"] for _, options in inputs["optional"].values())


def test_the_workflows_are_listed_as_templates(server):
    templates = server.get("/workflow_templates")
    assert sorted(templates["flowcache"], key=str.lower) == TITLES
