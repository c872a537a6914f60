"""Live Prompt in ComfyUI's page, in both of its looks: the video changes while it is made."""

import pytest
import torch

from tests.helpers.host.browser import CHROMIUM
from tests.helpers.host.comfy_page import ComfyPage, live
from tests.helpers.host.videos import frames_of
from tests.helpers.host.workflows import GRAPHS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, to test the page")
EXTEND = "FlowCacheAutoregressiveExtend"
CHUNKS = 32  # so that the page, which is slow without a graphics card, can steer meanwhile
SHOWN = "app.graph.nodes.find((node) => node.type === 'PreviewAny').widgets[0].value"

# How the page breaks the lines of the node that runs.
BREAKS = """[...document.querySelectorAll('.break-all')]
  .filter((part) => part.textContent.includes('fewer forwards')).map((part) => getComputedStyle(part).wordBreak)"""

QUEUED_ANEW = f"""
  const node = app.graph.nodes.find((node) => node.type === '{EXTEND}');
  const set = (name, value) => (node.widgets.find((widget) => widget.name === name).value = value);
  set('seed', 4);
  set('chunks', 2);
  await app.queuePrompt(0);
  await app.api.fetchApi('/interrupt', {{ method: 'POST' }})
"""


@pytest.fixture(scope="module")
def page(server):
    with ComfyPage(server, 900, 700) as opened:
        yield opened
        server.post("/settings/Comfy.VueNodes.Enabled", False)


@pytest.fixture
def opened(page, request):
    """The template in one of the page's looks, with few steps."""
    page.server.post("/settings/Comfy.VueNodes.Enabled", request.param)
    page.reopen()
    page.load(GRAPHS["demo_live_prompt"])
    page.set_widget(EXTEND, "steps", 5)
    page.set_widget("FlowCacheLivePrompt", "blend", 0)
    page.wait(live("text"))
    assert page.to_api()["2"]["inputs"] == {"text": "a white circle", "blend": 0}  # the box is none of the graph's
    return page


def shapes(page) -> list[str]:
    """Of the frames of the newest video: the colour of what is on them, white or magenta."""
    file = max(page.server.base.glob("output/flowcache/live_*.mp4"), key=lambda path: path.stat().st_mtime)
    red, green, _ = torch.from_numpy(frames_of(file)).float().unbind(-1)
    return ["magenta" if more else "white" for more in ((red - green).amax(dim=(1, 2)) > 100).tolist()]


@pytest.mark.parametrize("opened", [False], indirect=True, ids=["classic"])
def test_a_shape_changes_an_interrupt_loses_nothing_and_the_next_run_is_its_own(opened):
    page = opened
    page.set_widget(EXTEND, "chunks", CHUNKS)
    page.start()
    page.steer(2, "a magenta triangle")
    page.wait(f"({BREAKS}).length")
    assert page.evaluate(BREAKS) == ["normal"]
    page.wait(f"/magenta/.test({live('prompts')}.textContent)")  # it holds: on a busy machine that takes chunks
    page.at_chunk(4, QUEUED_ANEW)
    with pytest.raises(RuntimeError, match="interrupted"):
        page.finish()
    page.wait(f"{SHOWN} === '0-: a white circle'")  # the one that waited in the queue
    page.set_widget(EXTEND, "seed", 3)
    page.set_widget(EXTEND, "chunks", CHUNKS)
    page.run()
    text = page.evaluate(SHOWN)
    assert text.startswith("0-") and text.endswith("-: a magenta triangle")
    assert page.evaluate(f"{live('prompts')}.textContent") == text
    seen = shapes(page)
    assert seen[0] == "white" and seen[-1] == "magenta" and len(seen) == CHUNKS * 12 - 3
    assert page.errors == []


@pytest.mark.parametrize("opened", [True], indirect=True, ids=["Nodes 2.0"])
def test_a_run_ends_after_the_chunk_and_is_a_whole_video(opened):
    page = opened
    page.set_widget(EXTEND, "chunks", CHUNKS)
    page.set_widget(EXTEND, "seed", 5)
    page.start()
    page.steer(2, "a magenta triangle")
    page.steer(4, None)
    page.finish()
    page.wait(f"{live('apply')}.disabled && /over/.test({live('line')}.textContent)")
    seen = shapes(page)
    assert seen[0] == "white" and seen[-1] == "magenta" and 4 * 12 - 3 <= len(seen) < CHUNKS * 12 - 3
    assert page.errors == []
