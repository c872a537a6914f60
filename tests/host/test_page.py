"""ComfyUI's real page, in a headless browser: what a user sees from the template browser to the saved graph."""

import json

import pytest

from flowcache_core.demo.captions import embed_caption
from tests.helpers.host.browser import CHROMIUM
from tests.helpers.host.comfy_page import ComfyPage
from tests.helpers.host.comfy_server import Server
from tests.helpers.host.thumbnails import SIDE
from tests.helpers.host.workflows import API, GRAPHS, TITLES
from tests.host.store_release import RELEASED

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium, to test the page")
EXTEND = "FlowCacheAutoregressiveExtend"
RUN = ("demo_text_to_video", "demo_native_sampler")
BLUEPRINT = "FlowCache text to long video"
BUTTONS = "[...document.querySelectorAll('button')]"


@pytest.fixture(scope="module")
def page(server, published):
    with ComfyPage(server) as opened:
        yield opened


def test_a_search_finds_every_template_the_first_demo_first(page):
    """The page looks into titles alone, and those are the names of the files."""
    found = page.search_templates("flowcache")
    assert sorted(found, key=str.lower) == TITLES and found[0] == TITLES[0]


@pytest.mark.parametrize("name", GRAPHS)
def test_template_opens_and_runs(page, name):
    assert page.open_template(GRAPHS[name].stem) == SIDE, (
        f"{GRAPHS[name].stem}.jpg is missing: run tests/host/export_workflows.py {name}"
    )
    assert page.complaints() == []
    if name not in RUN:  # models of gigabytes, or long: that these run is tested through their API forms
        return
    page.set_widget(EXTEND, "chunks", 2)
    page.run()
    assert page.complaints() == []
    assert page.errors == []
    assert "SaveVideo" in page.evaluate("app.graph.nodes.filter((n) => app.nodeOutputs[n.id]).map((n) => n.type)")


def test_missing_models_are_offered_for_download(tmp_path):
    """A `.pt` file too; each goes to the folder that its loader lists."""
    bare = Server(tmp_path)
    try:
        with ComfyPage(bare) as page:
            page.load(GRAPHS["self_forcing_text_to_video"])
            more = "/Show missing models|View details/.test(button.innerText)"  # as newer pages call it
            page.wait(f"{BUTTONS}.some((button) => {more})")
            page.evaluate(f"{BUTTONS}.find((button) => {more}).click()")
            page.wait(f"{BUTTONS}.some((button) => button.innerText === 'Download all')")
            assert page.evaluate(f"{BUTTONS}.filter((button) => button.innerText === 'Download').length") == 3
            told = page.evaluate("document.body.innerText")
            for folder, file in (
                ("diffusion_models", "self_forcing_dmd.pt"),
                ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
                ("vae", "wan_2.1_vae.safetensors"),
            ):
                below = f"{file}\n{folder}" in told  # newer pages name the folder below each file
                assert below or told.index(f"{folder} (1)") < told.index(f"{file} (1)")
    finally:
        bare.stop()


@pytest.mark.parametrize("name", GRAPHS)
def test_api_form_is_the_same_graph(page, name):
    """workflows/api/ is what the page makes of workflows/; export_workflows.py writes it anew."""
    page.load(GRAPHS[name])
    assert page.to_api() == json.loads((API / f"{name}.json").read_text())


@pytest.mark.parametrize("file", sorted(RELEASED.glob("*/*.json")), ids=lambda file: f"{file.parent.name} {file.stem}")
def test_released_graph_keeps_its_values(page, file):
    """Widgets are stored by their place: a new one before an old one would shift them."""
    page.load(file)
    assert [said for said in page.complaints() if "overlaps" not in said] == []
    now = page.to_api()
    for key, node in json.loads((file.parent / "api" / file.name).read_text()).items():
        assert now[key]["class_type"] == node["class_type"]
        assert {name: now[key]["inputs"].get(name) for name in node["inputs"]} == node["inputs"]


def test_a_session(page):
    """Change a widget, run and watch, bypass FlowCache and run again, save, reload the page, open what was saved."""
    page.load(GRAPHS["demo_text_to_video"])
    page.set_widget(EXTEND, "chunks", 3)
    page.set_widget(EXTEND, "seed", 23)
    page.start()
    page.wait(f"{SHOWN}.some((line) => /chunk [1-3] of 3/.test(line))")
    page.wait(f"{NODE}.imgs?.length")  # the preview
    page.finish()
    page.wait("[...document.querySelectorAll('video')].some((video) => video.readyState > 1 && video.duration > 2)")
    assert "81% of steps reused" in page.evaluate(REPORT)

    page.evaluate("app.graph.nodes.find((node) => node.type === 'FlowCache').mode = 4")
    page.run()
    assert " 0% of steps reused" in page.evaluate(REPORT)

    prompt = page.to_api()
    assert "FlowCache" not in {node["class_type"] for node in prompt.values()}
    path = page.save()
    page.reopen()
    page.open_saved(path)
    assert page.complaints() == []
    assert page.to_api() == prompt
    assert page.errors == []


def test_a_stream_to_disk_is_all_that_a_run_needs_and_plays_meanwhile(page):
    page.load(GRAPHS["demo_long_video"])
    page.evaluate(ONLY_STREAMED)
    page.set_widget(EXTEND, "chunks", 6)
    page.start()
    page.evaluate(WATCHED)
    page.finish()
    assert page.evaluate("window.playedEarly"), "the finished part did not play while the run went on"
    whole = (6 * 12 - 3) / 16
    page.wait(f"Math.abs(document.querySelector('video')?.duration - {whole}) < 0.1")  # seconds
    stream = "app.graph.nodes.find((node) => node.type === 'FlowCacheStreamVideo')"
    assert page.evaluate(f"{stream}.videoContainer.contains(document.querySelector('video'))")
    assert page.complaints() == [] and page.errors == []


def test_fresh_captions_differ_and_the_blueprint_is_found_and_runs(page):
    page.load(GRAPHS["demo_text_to_video"])
    page.evaluate("app.graph.clear()")
    captions = page.evaluate(CAPTIONS)
    assert len(set(captions)) == 5 and all(embed_caption(caption).shape for caption in captions)
    page.evaluate("app.graph.clear()")
    page.add_by_search(BLUEPRINT)
    page.evaluate(WIRED)
    page.run()
    assert page.errors == []
    (video,) = page.saved_videos()
    assert video.stat().st_size > 0


@pytest.mark.parametrize(("language", "heading"), [("en", "Which preset"), ("zh", "选择预设")])
def test_help_shows_beside_the_node(page, language, heading):
    page.set_language(language)
    try:
        page.load(GRAPHS["demo_text_to_video"])
        page.evaluate("app.canvas.selectNode(app.graph.nodes.find((node) => node.type === 'FlowCache'))")
        page.click("[data-testid=info-button]")
        page.wait(f"document.querySelector('.node-help-content')?.innerText.includes('{heading}')")
        label = "历史预算" if language == "zh" else "history_budget"
        budget = (
            "app.graph.nodes.find((node) => node.type === 'FlowCache').widgets.find((w) => w.name === 'history_budget')"
        )
        assert page.evaluate(f"{budget}.label ?? {budget}.name") == label
    finally:
        page.set_language("en")


@pytest.mark.parametrize("nodes", ["classic", "Nodes 2.0"])
def test_a_node_shows_what_its_preset_uses_and_covers_no_other(page, nodes):
    """As the page draws it; what was changed from its default is never hidden, and the API form holds everything."""
    page.server.post("/settings/Comfy.VueNodes.Enabled", nodes == "Nodes 2.0")
    page.reopen()
    try:
        page.load(GRAPHS["demo_text_to_video"])
        before = page.to_api()
        custom = ["preset", "history_budget", "policy", "every", "warmup", "forecast", "correct"]
        changes = [
            ({}, ["preset", "history_budget"]),
            ({"preset": "quality"}, ["preset", "history_budget", "quality"]),
            ({"preset": "custom"}, custom),
            ({"policy": "teacache"}, [*custom[:3], "threshold", *custom[4:]]),
            ({"policy": "even", "preset": "balanced", "history_budget": 2, "positions": "relative"},
             ["preset", "history_budget", "positions"]),
            ({"history_budget": 0, "positions": "absolute"}, ["preset", "history_budget"]),
        ]  # fmt: skip
        for changed, expected in changes:
            for name, value in changed.items():
                page.evaluate(CHANGED % (json.dumps(name), json.dumps(value)))
            page.wait(f"({DRAWN % json.dumps('FlowCache')}).join() === {json.dumps(','.join(expected))}")
        page.wait(f"({DRAWN % json.dumps(EXTEND)}).join() === 'seed,chunks,steps,width,height'")
        page.evaluate(f"{NODE}.toggleAdvanced ? {NODE}.toggleAdvanced() : ({NODE}.showAdvanced = true)")
        page.wait(f"({DRAWN % json.dumps(EXTEND)}).includes('condition_noise')")
        assert page.to_api() == before and page.errors == []
        page.load(GRAPHS["demo_text_to_video"])
        page.wait(f"!({DRAWN % json.dumps(EXTEND)}).includes('strength')")
        page.evaluate(FROM_VIDEO)
        page.wait(f"({DRAWN % json.dumps(EXTEND)}).includes('strength')")
        for name in ("demo_text_to_video", "demo_long_video", "skyreels_extend") if nodes == "Nodes 2.0" else ():
            page.load(GRAPHS[name])  # the canvas's own sizes are measured where each template is opened
            assert page.overlaps() == [], name
    finally:
        page.server.post("/settings/Comfy.VueNodes.Enabled", False)
        page.reopen()


FROM_VIDEO = """(() => {
  const latent = LiteGraph.createNode('EmptyARVideoLatent');
  const node = app.graph.nodes.find((node) => node.type === 'FlowCacheAutoregressiveExtend');
  app.graph.add(latent);
  latent.connect(0, node, node.findInputSlot('video'));
})()"""
CHANGED = """(() => {
  const node = app.graph.nodes.find((node) => node.type === 'FlowCache');
  const widget = node.widgets.find((widget) => widget.name === %s);
  widget.value = %s;
  widget.callback?.(widget.value);
})()"""
# Names of the inputs that a node of a kind shows: by the elements of Nodes 2.0, by the canvas's own rule else.
DRAWN = """(() => {
  const node = app.graph.nodes.find((node) => node.type === %s);
  const names = Object.keys({...node.constructor.nodeData.input.required, ...node.constructor.nodeData.input.optional});
  const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
  const lines = drawn?.innerText.split('\\n').map((line) => line.trim());
  return node.widgets.filter((widget) => names.includes(widget.name))
    .filter((widget) => (lines ? lines.includes(widget.label ?? widget.name) : node.isWidgetVisible(widget)))
    .map((widget) => widget.name);
})()"""
NODE = f"app.graph.nodes.find((node) => node.type === '{EXTEND}')"
SHOWN = f"{NODE}.widgets.filter((widget) => widget.name.startsWith('$$')).map((widget) => String(widget.value))"
REPORT = "String(app.graph.nodes.find((node) => node.type === 'PreviewAny').widgets[0].value)"
WATCHED = """(() => {
  window.playedEarly = false;
  const watch = setInterval(() => {
    const video = document.querySelector('video');
    window.playedEarly ||= !window.runEnded && video?.readyState > 1 && video.duration > 0;
    if (window.runEnded) clearInterval(watch);
  }, 20);
})()"""
ONLY_STREAMED = """(() => {
  const rest = ['FlowCacheReport', 'VAEDecode', 'FlowCacheCompareVideos', 'ImageScaleBy', 'CreateVideo', 'SaveVideo'];
  app.graph.nodes.filter((node) => rest.includes(node.type) || node.title.startsWith('Plain'))
    .forEach((node) => app.graph.remove(node));
})()"""
CAPTIONS = """[1, 2, 3, 4, 5].map(() => {
  const node = LiteGraph.createNode('FlowCacheDemoPrompt');
  app.graph.add(node);
  return node.widgets[0].value;
})"""
WIRED = """(() => {
  const add = (type, ...values) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    values.forEach((value, index) => (node.widgets[index].value = value));
    return node;
  };
  const video = app.graph.nodes[0];
  const put = (from, name) => from.connect(0, video, video.inputs.findIndex((input) => input.name === name));
  put(add('FlowCacheLoadARVideoModel'), 'model');
  put(add('FlowCacheDemoPrompt', 'a red circle'), 'positive');
  put(add('FlowCacheDemoPrompt', ''), 'negative');
  put(add('FlowCacheLoadDemoVAE'), 'vae');
  video.widgets.find((widget) => widget.name === 'chunks').value = 2;
  video.connect(0, add('SaveVideo', 'flowcache/blueprint'), 0);
})()"""
