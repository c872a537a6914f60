// A Demo Prompt that is added beside others begins with a caption that none of them has. Graphs that are loaded, pasted
// nodes and the API keep what they say.

import { app } from "../../scripts/app.js";

const KIND = "FlowCacheDemoPrompt";
const MORE = ["a yellow triangle", "a green circle", "a white square and a magenta triangle", "a cyan square"];

const caption = (node) => node.widgets?.find((widget) => widget.name === "caption");

app.registerExtension({
  name: "flowcache.captions",
  nodeCreated(node) {
    if (node.comfyClass !== KIND || app.configuringGraph) return;
    const graph = app.canvas?.graph ?? app.graph;
    const others = graph?.nodes.filter((other) => other !== node && other.comfyClass === KIND) ?? [];
    const taken = new Set(others.map((other) => caption(other)?.value));
    const mine = caption(node);
    if (mine && taken.has(mine.value)) mine.value = MORE.find((each) => !taken.has(each)) ?? mine.value;
  },
});
