"""ComfyUI's page in a browser: opens workflows as a user drops them, runs them, looks at them."""

import json
import time
from itertools import combinations
from pathlib import Path

from PIL import Image

from tests.helpers.host.browser import Browser
from tests.helpers.host.comfy_server import Server
from tests.helpers.host.workflows import WORKFLOWS

TITLE = 30  # pixels, of a node's title
SETTINGS = {  # no first-run dialogs, nothing floating over the graph
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
}


class ComfyPage(Browser):
    """The page of a running server, loaded and empty."""

    def __init__(self, server: Server, width: int = 1400, height: int = 900):
        self.server = server
        for name, value in SETTINGS.items():
            server.post(f"/settings/{name}", value)
        super().__init__(width, height)
        try:
            self.reopen()
        except BaseException:
            self.close()
            raise

    def reopen(self) -> None:
        """Loads the page anew."""
        self.open(self.server.address)
        self.wait("window.app?.vueAppReady && app.canvas && app.extensionManager")
        self.wait("app.extensionManager.workflow.activeWorkflow && app.graph.nodes.length")  # what was open last
        self.errors.clear()  # its own, while it loads

    def set_language(self, name: str) -> None:
        self.server.post("/settings/Comfy.Locale", name)
        self.reopen()

    def click(self, selector: str) -> None:
        """Clicks the first element, once it is there."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(found)
        self.evaluate(f"{found}.click()")

    def open_template(self, title: str) -> int:
        """Opens a workflow by its card in the template browser; returns the width of the card's picture."""
        card = OPEN_CARD % json.dumps(f'[data-testid="template-workflow-{title}"]')
        for _ in range(3):  # a picture that once failed to load stays broken until the browser is opened again
            self.close_dialog()
            self.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
            try:
                self.wait(card, 40)
                break
            except TimeoutError as error:
                missed = error
        else:
            raise missed
        width = self.evaluate("window.cardWidth")
        path = rf"/{title}( \(\d+\))?\.json$/"  # numbered where it is open already
        self.wait(f"{path}.test(app.extensionManager.workflow.activeWorkflow.path)")
        self.wait(f"app.graph.nodes.length === {len(json.loads((WORKFLOWS / f'{title}.json').read_text())['nodes'])}")
        return width

    def search_templates(self, text: str) -> list[str]:
        """Titles of the cards that the template browser shows for a text that finds nothing but the pack's."""
        self.close_dialog()
        self.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.wait(f"{CARDS}.length")
        self.evaluate("document.querySelector('[role=dialog] input[type=text]').focus()")
        self.call("Input.insertText", text=text)
        self.wait(f"{CARDS}.length && {CARDS}.every((title) => title.startsWith('FlowCache'))")
        found = self.evaluate(CARDS)
        self.close_dialog()
        return found

    def close_dialog(self) -> None:
        """Closes the dialog that is open, if one is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
        self.wait("!document.querySelector('[role=dialog]')")

    def add_by_search(self, name: str) -> None:
        """Adds the node that the search finds for a name, as after a double click on the empty canvas."""
        nodes = self.evaluate("app.graph.nodes.length")
        self.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        self.wait("document.activeElement?.tagName === 'INPUT'")
        self.call("Input.insertText", text=name)
        self.wait(
            f"[...document.querySelectorAll('[role=dialog] *')].some((part) => part.innerText === {json.dumps(name)})"
        )
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
        self.wait(f"app.graph.nodes.length === {nodes + 1}")

    def set_widget(self, kind: str, name: str, value) -> None:
        """Changes a widget of every node of a kind."""
        nodes = f"app.graph.nodes.filter((node) => node.type === {json.dumps(kind)})"
        widget = f"node.widgets.find((widget) => widget.name === {json.dumps(name)})"
        self.evaluate(f"{nodes}.forEach((node) => ({widget}.value = {json.dumps(value)}))")

    def save(self) -> str:
        """Saves the open graph under its name and returns its path among the user's files."""
        self.evaluate("app.extensionManager.workflow.saveWorkflow(app.extensionManager.workflow.activeWorkflow)")
        return self.evaluate("app.extensionManager.workflow.activeWorkflow.path")

    def open_saved(self, path: str) -> None:
        """Opens a saved graph."""
        self.evaluate(OPEN_SAVED % json.dumps(path))

    def load(self, workflow: Path) -> None:
        """Opens a workflow file as if it had been dropped on the page."""
        text = json.dumps(workflow.read_text())
        name = json.dumps(workflow.name)
        self.evaluate(f"app.handleFile(new File([{text}], {name}, {{type: 'application/json'}}))")
        nodes = len(json.loads(workflow.read_text())["nodes"])
        self.wait(f"app.graph.nodes.length === {nodes}")

    def complaints(self) -> list[str]:
        """What is wrong with the graph: unknown nodes, open inputs, values that a list does not hold, overlaps."""
        return self.evaluate(COMPLAINTS)

    def node_sizes(self) -> dict[str, list[float]]:
        """Width and height of each node's body by its id, as Nodes 2.0 draws it."""
        self.wait(f"Object.keys({SIZES}).length === app.graph.nodes.length")
        return self.evaluate(SIZES)

    def overlaps(self) -> list[str]:
        """Nodes that lie over one another as Nodes 2.0 draws them, titles included."""
        sizes = self.node_sizes()
        places = self.evaluate("app.graph.nodes.map((node) => [String(node.id), node.title, ...node.pos])")
        boxes = [(f"{key} {title}", x, y - TITLE, x + sizes[key][0], y + sizes[key][1]) for key, title, x, y in places]
        return [
            f"{one[0]} overlaps {other[0]}"
            for one, other in combinations(boxes, 2)
            if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
        ]

    def to_api(self) -> dict:
        """The open graph in the form that is posted to /prompt."""
        made = self.evaluate("app.graphToPrompt().then(made => made.output)")
        for node in made.values():
            node["inputs"].pop("video-preview", None)  # the player, which comes when a video has been read
        return made

    def run(self, timeout: float = 600) -> None:
        """Presses Run and waits for the end.

        Raises:
            RuntimeError: the server refused the graph, or a node failed.
        """
        self.start()
        self.finish(timeout)

    def start(self) -> None:
        """Presses Run."""
        self.evaluate(RUN)

    def finish(self, timeout: float = 600) -> None:
        """Waits for the end of what `start` began; errors as for `run`."""
        self.wait("window.runEnded", timeout)
        ended = self.evaluate("window.runEnded")
        if ended != "execution_success":
            raise RuntimeError(ended)

    def steer(self, chunk: int, text: str | None) -> None:
        """Applies another caption on the graph's Live Prompt once a chunk begins, by its number from 1; none: ends the
        run."""
        write = "" if text is None else f"{live('text')}.value = {json.dumps(text)};"
        self.at_chunk(chunk, f"{write} {live('apply' if text else 'stop')}.click()")

    def at_chunk(self, chunk: int, act: str) -> None:
        """Runs JavaScript in the page as soon as the graph's Live Prompt tells of a chunk, by its number from 1."""
        self.evaluate(f"(async () => {{ await {REACHED % chunk}; {act}; }})()")

    def saved_videos(self) -> list[Path]:
        """Files that the open graph's SaveVideo nodes wrote, in the nodes' order; where it has none, streamed ones."""
        return [self.server.base / file["type"] / file["subfolder"] / file["filename"] for file in self.evaluate(SAVED)]

    def picture(self, path: Path, width: int = 1400) -> None:
        """A screenshot of the whole graph and nothing else, after a run: videos stand still near their end."""
        self.evaluate("app.extensionManager.focusMode = true; app.canvas.deselectAll()")
        across, down = self.evaluate(f"({BOUNDS}).slice(2)")
        self.resize(width, round(width * down / across))
        self.wait(f"innerWidth === {width} && app.canvasEl.clientWidth === {width}")
        self.evaluate(FIT)
        videos = self.evaluate("app.graph.nodes.filter((node) => /SaveVideo|StreamVideo/.test(node.type)).length")
        self.wait(f"{VIDEOS}.length === {videos} && {VIDEOS}.every((video) => video.readyState > 1)")
        self.evaluate(STOP)
        self.wait(f"{VIDEOS}.every((video) => !video.seeking)")
        time.sleep(2)  # the page draws
        self.screenshot(path)
        shot = Image.open(path).convert("RGB")
        shot.quantize(palette=shot.quantize(256, kmeans=1)).save(path, optimize=True)


def live(part: str) -> str:
    """A part of Live Prompt's box: "text", "apply", "stop", "line" or "prompts"."""
    return f"document.querySelector('[data-live={part}]')"


CARDS = """[...document.querySelectorAll('[data-testid^=template-workflow-]')]
  .map((card) => card.dataset.testid.slice(18))"""
CATEGORY = "[...document.querySelectorAll('[role=dialog] [role=button] span')].find((s) => s.innerText === 'FlowCache')"

# The browser draws its cards anew when its lists arrive, so a card is looked for, read and clicked in one go.
OPEN_CARD = f"""(() => {{
  const card = document.querySelector(%s);
  if (!card) {CATEGORY}?.click();
  const shown = [...document.querySelectorAll('[data-testid^="template-workflow-"]')];  // more come when scrolled to
  (card ?? shown.at(-1))?.scrollIntoView();
  const picture = card?.querySelector('img');
  if (!picture?.complete || !picture.naturalWidth) return false;
  window.cardWidth = picture.naturalWidth;
  picture.click();
  return true;
}})()"""

OPEN_SAVED = """(async () => {
  const store = app.extensionManager.workflow;
  await store.syncWorkflows();
  const saved = await store.getWorkflowByPath(%s).load({ force: true });
  await app.loadGraphData(JSON.parse(saved.originalContent), true, true, saved);
})()"""

COMPLAINTS = """(() => {
  const said = [];
  const nodes = app.graph.nodes;
  for (const node of nodes) {
    const name = `${node.id} ${node.title}`;
    if (!LiteGraph.registered_node_types[node.type]) said.push(`${name}: no such node`);
    if (node.has_errors) said.push(`${name}: red`);
    for (const [index, input] of node.inputs.entries()) {
      const required = node.constructor.nodeData?.input?.required ?? {};
      if (!input.widget && input.name in required && !node.isInputConnected(index))
        said.push(`${name}: input ${input.name} is open`);
    }
    for (const widget of node.widgets ?? []) {
      const values = widget.options?.values;
      if (Array.isArray(values) && !values.includes(widget.value))
        said.push(`${name}: ${widget.name} is ${widget.value}`);
    }
    const [x, y, width, height] = node.boundingRect;
    for (const other of nodes) {
      const [ox, oy, ow, oh] = other.boundingRect;
      if (other.id > node.id && x < ox + ow && ox < x + width && y < oy + oh && oy < y + height)
        said.push(`${name} overlaps ${other.id} ${other.title}`);
    }
  }
  return said;
})()"""

SIZES = """Object.fromEntries([...document.querySelectorAll('[data-node-id]')]
  .filter((part) => part.offsetHeight)
  .map((part) => [part.dataset.nodeId, [part.offsetWidth, part.offsetHeight - 30]]))"""

RUN = """(() => {
  window.runEnded = null;
  const ends = ['execution_success', 'execution_error', 'execution_interrupted'];
  const ended = (event) => {
    ends.forEach((name) => app.api.removeEventListener(name, ended));
    window.runEnded = event.type + (event.type === ends[0] ? '' : `: ${JSON.stringify(event.detail)}`);
  };
  ends.forEach((name) => app.api.addEventListener(name, ended));
  return app.queuePrompt(0).then(() => {
    const errors = app.lastNodeErrors;
    if (errors && Object.keys(errors).length) window.runEnded = JSON.stringify(errors);
  });
})()"""

REACHED = """new Promise((done) => {
  const line = document.querySelector('[data-live=line]');
  const look = () => {
    if (!(Number(/^chunk (\\d+) of/.exec(line.textContent)?.[1]) >= %d)) return;
    watch.disconnect();
    done();
  };
  const watch = new MutationObserver(look);
  watch.observe(line, { childList: true, characterData: true, subtree: true });
  look();
})"""

SAVED = """(() => {
  const of = (type) => app.graph.nodes.filter((node) => node.type === type).sort((a, b) => a.id - b.id);
  const nodes = of('SaveVideo').length ? of('SaveVideo') : of('FlowCacheStreamVideo');
  // Plain ones: newer pages hand out objects whose fields are not listed.
  const plain = ({ filename, subfolder, type }) => ({ filename, subfolder, type });
  return nodes.flatMap((node) => app.nodeOutputs[node.id].images.map(plain));
})()"""

BOUNDS = """(() => {
  const boxes = [...app.graph.nodes, ...app.graph.groups].map((item) => item.boundingRect);
  const least = (i) => Math.min(...boxes.map((box) => box[i])) - 20;
  const most = (i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])) + 20;
  return [least(0), least(1), most(0) - least(0), most(1) - least(1)];
})()"""

FIT = f"""(() => {{
  const [left, top, across] = {BOUNDS};
  app.canvas.ds.scale = innerWidth / across;
  app.canvas.ds.offset = [-left, -top];
  app.canvas.setDirty(true, true);
  document.querySelectorAll('.no-drag.fixed').forEach((menu) => (menu.style.display = 'none'));
}})()"""

VIDEOS = "[...document.querySelectorAll('video')]"
STOP = f"""{VIDEOS}.forEach((video) => {{
  video.controls = false;
  video.pause();
  video.currentTime = 0.75 * video.duration;
}})"""
