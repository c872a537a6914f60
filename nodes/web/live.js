// Live Prompt: a box that stays live while a run goes on. What is applied there goes to the run, not into the graph.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ADDRESS = "/flowcache/live";
const MOST_RUNS = 50; // that are remembered

const WORDS = {
  en: {
    apply: "apply",
    stop: "stop after this chunk",
    hint: "While a run goes on: another prompt",
    idle: "No run is on.",
    over: "The run is over.",
    lost: "The server did not answer.",
  },
  zh: {
    apply: "应用",
    stop: "在当前分块后停止",
    hint: "运行期间：新的提示词",
    idle: "没有正在进行的运行。",
    over: "运行已结束。",
    lost: "服务器没有回应。",
  },
};

const words = () => WORDS[app.extensionManager?.setting?.get?.("Comfy.Locale")] ?? WORDS.en;
const store = () => app.extensionManager?.workflow;

// By the server's name of a run: the workflow that it was queued from, and what was told of it last.
const runs = new Map();

function remember(id, more) {
  const told = { ...runs.get(id), ...more };
  runs.delete(id);
  runs.set(id, told);
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
  return told;
}

/** The node of an id, through subgraphs. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/** Whether a run is of another workflow than the one that is open; its nodes may have the same ids. */
const isElsewhere = ({ workflow }) =>
  workflow && workflow !== store()?.activeWorkflow && store()?.openWorkflows?.includes(workflow);

function element(kind, style, more = {}) {
  const made = Object.assign(document.createElement(kind), more);
  made.style.cssText = style;
  return made;
}

function addBox(node) {
  const colours = "background: var(--comfy-input-bg); color: var(--input-text); border: 1px solid var(--border-color);";
  const frame = element("div", "display: flex; flex-direction: column; gap: 4px; height: 100%; font-size: 12px;");
  const text = element("textarea", `${colours} flex: 1; min-height: 40px; resize: none; padding: 4px;`, {
    placeholder: words().hint,
  });
  const line = element("div", "min-height: 15px; overflow-wrap: anywhere;", { textContent: words().idle });
  const prompts = element("div", "max-height: 60px; overflow-y: auto; white-space: pre-wrap; user-select: text;");
  const buttons = element("div", "display: flex; gap: 4px;");
  const button = (name, body) => {
    const made = element("button", `${colours} flex: 1; padding: 4px; cursor: pointer;`, {
      textContent: words()[name],
      onclick: () => send(body()),
    });
    made.dataset.live = name;
    buttons.append(made);
    return made;
  };
  const blend = () => node.widgets.find((widget) => widget.name === "blend")?.value;
  const apply = button("apply", () => ({ text: text.value, blend: blend() }));
  const stop = button("stop", () => ({ stop: true }));
  text.dataset.live = "text";
  line.dataset.live = "line";
  prompts.dataset.live = "prompts";
  frame.append(text, buttons, line, prompts);
  for (const kind of ["pointerdown", "wheel", "keydown"]) frame.addEventListener(kind, (event) => event.stopPropagation());
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !apply.disabled) apply.click();
  });

  function setLive(on) {
    for (const each of [apply, stop]) {
      each.disabled = !on;
      each.style.opacity = on ? "1" : "0.5";
    }
  }
  setLive(false);

  let run = {}; // that goes on
  async function send(body) {
    const { prompt_id, node: node_id } = run;
    try {
      const answer = await api.fetchApi(ADDRESS, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ prompt_id, node_id, ...body }),
      });
      const told = await answer.json();
      line.textContent = told.said ?? told.error;
    } catch {
      line.textContent = words().lost;
    }
  }

  const shown = node.addDOMWidget("live", "flowcache_live", frame, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 150,
  });
  shown.serialize = false;
  node.flowcacheLive = (told) => {
    if (!told.running && told.prompt_id !== run.prompt_id) return; // another one has begun since
    run = told;
    setLive(told.running);
    line.textContent = told.running ? told.said : words().over;
    prompts.textContent = told.prompts ?? "";
    prompts.scrollTop = prompts.scrollHeight; // the newest
  };
}

app.registerExtension({
  name: "flowcache.live",
  setup() {
    const queue = api.queuePrompt;
    api.queuePrompt = async function (...given) {
      const workflow = store()?.activeWorkflow;
      const answer = await queue.apply(this, given);
      if (answer?.prompt_id) remember(answer.prompt_id, { workflow });
      return answer;
    };
    api.addEventListener("flowcache.live", ({ detail }) => {
      const told = remember(detail.prompt_id, detail);
      if (!isElsewhere(told)) nodeOf(told.node)?.flowcacheLive?.(told);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== "FlowCacheLivePrompt") return;
    addBox(node);
    node.setSize([Math.max(node.size[0], 320), Math.max(node.size[1], node.computeSize()[1])]);
  },
});
