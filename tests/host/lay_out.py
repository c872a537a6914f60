"""Moves nodes of the graphs in workflows/ apart where they would lie over one another: they are taller in Nodes 2.0
than on the canvas. What is above goes first; groups follow what they hold.

Run it after a node has got an input or a graph a node: python tests/host/lay_out.py [API names]
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

from tests.helpers.host.comfy_page import ComfyPage  # noqa: E402
from tests.helpers.host.comfy_server import Server  # noqa: E402
from tests.helpers.host.published import write_published  # noqa: E402
from tests.helpers.host.workflows import GRAPHS  # noqa: E402

TITLE, GAP, APART = 30, 16, 80  # pixels: of a node's title, between nodes, between what no group holds together
EDGE, HEAD = 20, 70  # of a group around its nodes, at its sides and above the first node's body


def lay_out(graph: dict, sizes: dict[int, list[float]]) -> bool:
    """Moves nodes of a graph as it is stored; whether anything was moved.

    Args:
        sizes: width and height of each node without its title, by its id.
    """
    groups = [(group, _held(group, graph["nodes"])) for group in graph.get("groups", [])]
    group_of = {node["id"]: number for number, (_, held) in enumerate(groups) for node in held}
    placed: list[dict] = []
    before = json.dumps(graph)
    for node in sorted(graph["nodes"], key=lambda node: node["pos"][1]):
        left, right = node["pos"][0], node["pos"][0] + sizes[node["id"]][0]
        for other in placed:
            if other["pos"][0] >= right or left >= other["pos"][0] + sizes[other["id"]][0]:
                continue
            mine, others = group_of.get(node["id"]), group_of.get(other["id"])
            gap = GAP if mine == others and mine is not None else APART
            least = other["pos"][1] + sizes[other["id"]][1] + TITLE + gap
            node["pos"][1] = max(node["pos"][1], round(least))
        placed.append(node)
    for group, held in groups:
        if held:
            left, top = (min(node["pos"][axis] for node in held) for axis in (0, 1))
            right, bottom = (max(node["pos"][axis] + sizes[node["id"]][axis] for node in held) for axis in (0, 1))
            group["bounding"] = [
                left - EDGE,
                top - HEAD,
                round(right - left) + 2 * EDGE,
                round(bottom - top) + HEAD + EDGE,
            ]
    return json.dumps(graph) != before


def _held(group: dict, nodes: list[dict]) -> list[dict]:
    """Nodes whose title lies inside a group."""
    left, top, width, height = group["bounding"]
    return [
        node for node in nodes if left <= node["pos"][0] < left + width and top <= node["pos"][1] - TITLE < top + height
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            write_published(server.base)
            server.post("/settings/Comfy.VueNodes.Enabled", True)
            with ComfyPage(server) as page:
                for name in sys.argv[1:] or GRAPHS:
                    path = GRAPHS[name]
                    words = path.read_text(encoding="utf-8")
                    page.load(path)
                    sizes = {int(key): size for key, size in page.node_sizes().items()}
                    graph = json.loads(words)
                    for node in graph["nodes"]:  # what is stored has room for a preview
                        sizes[node["id"]] = [max(pair) for pair in zip(sizes[node["id"]], node["size"], strict=True)]
                    if lay_out(graph, sizes):
                        end = "\n" if words.endswith("\n") else ""
                        path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + end, encoding="utf-8")
                        print(name)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
