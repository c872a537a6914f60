// A node of ours shows the inputs that its preset uses. The page folds away inputs that are marked as advanced only in
// Nodes 2.0 and knows nothing of what depends on what. Names, order and values of the inputs stay as they are.

import { app } from "../../scripts/app.js";

const SHOWN = "shown";
const FOLDED = "folded"; // behind the node's "Show Advanced"
const GONE = "gone";

const isOurs = (node) => node.comfyClass?.startsWith("FlowCache") && node.widgets;
const isCustom = (at) => at.preset === "custom";
const cuts = (at) => at.history_budget > 0;
const keepsFrames = (at) => at.window_frames > 0;
const scores = (at) => cuts(at) && at.history_rule === "flowcache";
const rolls = (at) => at.history_rule.endsWith("sink"); // brings its own sink and positions

const shownIf = (used) => (used ? SHOWN : GONE);
const takes = (node, name) => node.inputs?.some((input) => input.name === name && input.link != null);
const foldedIf = (used) => (used ? FOLDED : GONE);

// By node and input: where it belongs, by what the node's other widgets hold (`at`) and what is linked to it.
const PLACES = {
  FlowCache: {
    policy: (at) => shownIf(isCustom(at)),
    every: (at) => shownIf(isCustom(at) && at.policy === "even"),
    threshold: (at) => shownIf(isCustom(at) && at.policy !== "even"),
    warmup: (at) => shownIf(isCustom(at)),
    forecast: (at) => shownIf(isCustom(at)),
    correct: (at) => shownIf(isCustom(at) && at.forecast !== "hold"),
    quality: (at) => shownIf(at.preset === "quality"),
    history_rule: (at) => foldedIf(cuts(at) || keepsFrames(at)),
    granularity: (at) => foldedIf(scores(at)),
    importance_weight: (at) => foldedIf(scores(at)),
    queries: (at) => foldedIf(scores(at)),
    asked_from: (at) => foldedIf(scores(at) && at.queries > 0),
    keep_first_chunk: (at) => foldedIf(cuts(at) && !rolls(at)),
    positions: (at) => foldedIf((cuts(at) || keepsFrames(at)) && !rolls(at)),
    window_frames: (at) => foldedIf(!cuts(at) || keepsFrames(at)),
    sink_frames: (at) => foldedIf((keepsFrames(at) && !rolls(at)) || at.sink_frames > 0),
    sink_share: (at) => foldedIf(at.sink_frames > 0),
  },
  FlowCacheAutoregressiveExtend: {
    guidance: () => FOLDED,
    frames_per_chunk: () => FOLDED,
    lag: () => FOLDED,
    strength: (at, node) => (takes(node, "video") ? SHOWN : FOLDED),
  },
};

const inputsOf = (node) => {
  const told = node.constructor.nodeData?.input ?? {};
  return { ...told.required, ...told.optional };
};

function placeOf(node, widget, values, inputs) {
  const options = inputs[widget.name]?.[1] ?? {};
  const place = PLACES[node.comfyClass]?.[widget.name]?.(values, node) ?? (options.advanced ? FOLDED : SHOWN);
  const linked = node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
  if (linked) return SHOWN;
  return place === FOLDED && widget.value !== options.default ? SHOWN : place; // what was changed is to be seen
}

/** Puts every input of a node where it belongs now. */
function fold(node) {
  const inputs = inputsOf(node);
  const values = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
  let changed = false;
  const set = (holder, name, value) => {
    changed ||= (holder[name] ?? false) !== value;
    holder[name] = value;
  };
  for (const widget of node.widgets) {
    if (!(widget.name in inputs)) continue; // the page's own
    const place = placeOf(node, widget, values, inputs);
    widget.options ??= {};
    set(widget, "advanced", place === FOLDED);
    set(widget, "hidden", place === GONE || (place === FOLDED && !node.showAdvanced)); // else the canvas leaves a gap
    set(widget.options, "advanced", place === FOLDED); // these two are for Nodes 2.0
    set(widget.options, "hidden", place === GONE);
  }
  if (!changed) return;
  node.setSize([node.size[0], node.computeSize()[1]]);
  node.widgets = [...node.widgets]; // Nodes 2.0 looks at them anew, and after a new link only when it is told so
  const told = { nodeId: node.id, property: "showAdvanced", oldValue: node.showAdvanced, newValue: node.showAdvanced };
  node.graph?.trigger?.("node:property:changed", { type: "node:property:changed", ...told });
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "flowcache.fold",
  nodeCreated(node) {
    if (!isOurs(node)) return;
    for (const widget of node.widgets) {
      const before = widget.callback;
      widget.callback = function (...given) {
        const answer = before?.apply(this, given);
        fold(node);
        return answer;
      };
    }
    const toggle = node.toggleAdvanced;
    node.toggleAdvanced = function (...given) {
      toggle?.apply(this, given);
      fold(node);
    };
    const linked = node.onConnectionsChange;
    node.onConnectionsChange = function (...given) {
      linked?.apply(this, given);
      fold(node);
    };
    fold(node);
  },
  loadedGraphNode(node) {
    if (!isOurs(node)) return;
    fold(node);
    if (node.comfyClass === "FlowCache") node.setSize([node.size[0], node.computeSize()[1]]); // of when all was shown
  },
});
