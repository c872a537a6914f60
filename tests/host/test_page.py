"""Every workflow in ComfyUI's real page, in a headless browser: nothing missing or red, and it runs to a result."""

import json

import pytest
from browser import CHROMIUM
from comfy_page import DEMOS, NAMES, WORKFLOWS, ComfyPage, listed_templates

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, to test the page")


@pytest.fixture(scope="module")
def page(server, published):
    with ComfyPage(server) as opened:
        yield opened


def test_template_browser_lists_the_workflows(server):
    assert sorted(listed_templates(server)) == NAMES


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(DEMOS)))
def test_workflow_loads(page, name):
    """Models of gigabytes: that these run is tested through their API forms."""
    page.load(WORKFLOWS / f"{name}.json")
    assert page.complaints() == []
    assert page.errors == []


@pytest.mark.parametrize("name", DEMOS)
def test_workflow_loads_and_runs(page, name):
    page.load(WORKFLOWS / f"{name}.json")
    assert page.complaints() == []
    page.run()
    assert page.complaints() == []
    assert page.errors == []
    shown = page.evaluate("app.graph.nodes.filter((node) => app.nodeOutputs[node.id]).map((node) => node.type)")
    assert "SaveVideo" in shown


@pytest.mark.parametrize("name", NAMES)
def test_api_form_is_the_same_graph(page, name):
    """workflows/api/ is what the page makes of workflows/; export_workflows.py writes it anew."""
    page.load(WORKFLOWS / f"{name}.json")
    assert page.to_api() == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
