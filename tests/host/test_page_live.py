"""Live Prompt in ComfyUI's page, in both of its looks: the video changes while it is made, and ends when it is told."""

import json

import pytest

from tests.helpers.host.browser import CHROMIUM
from tests.helpers.host.comfy_page import WORKFLOWS, ComfyPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, to test the page")
LIVE = "app.graph.nodes.find((node) => node.type === 'FlowCacheLivePrompt')"
EXTEND = "FlowCacheAutoregressiveExtend"


@pytest.fixture(scope="module")
def page(server):
    with ComfyPage(server, 900, 700) as opened:
        yield opened
    server.post("/settings/Comfy.VueNodes.Enabled", False)


def part(name: str) -> str:
    return f"document.querySelector('[data-live={name}]')"


def test_try(page):
    for nodes in (False, True):
        page.server.post("/settings/Comfy.VueNodes.Enabled", nodes)
        page.reopen()
        page.load(WORKFLOWS / "demo_text_to_video.json")
        page.evaluate(PUT_IN)
        page.wait(part("text"))
        import time

        time.sleep(2)
        from pathlib import Path

        page.screenshot(Path(f"/tmp/live_{nodes}.png"))
        print(json.dumps(page.to_api(), indent=1)[:3000])
        print(page.errors)
        page.set_widget(EXTEND, "chunks", 5)
        page.set_widget(EXTEND, "steps", 8)
        page.start()
        page.wait(f"/chunk 2 of 5/.test({part('line')}.textContent)")
        page.evaluate(f"{part('text')}.value = 'a blue square'")
        page.evaluate(f"{part('apply')}.click()")
        page.wait(f"/blue square/.test({part('prompts')}.textContent)")
        page.evaluate(f"{part('stop')}.click()")
        page.finish()
        page.wait(f"/over/.test({part('line')}.textContent)")
        print(page.evaluate(f"{part('prompts')}.textContent"))
        time.sleep(1)
        page.screenshot(Path(f"/tmp/live_{nodes}_b.png"))
        print(page.errors)


PUT_IN = """(() => {
  const caption = app.graph.nodes.find((node) => node.type === 'FlowCacheDemoPrompt');
  const extend = app.graph.nodes.find((node) => node.type === 'FlowCacheAutoregressiveExtend');
  const live = LiteGraph.createNode('FlowCacheLivePrompt');
  app.graph.add(live);
  live.pos = [caption.pos[0], caption.pos[1]];
  app.graph.remove(caption);
  live.connect(0, extend, extend.inputs.findIndex((input) => input.name === 'positive'));
  app.canvas.centerOnNode(live);
})()"""
