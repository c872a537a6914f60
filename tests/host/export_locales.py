"""Writes locales/en/nodeDefs.json from the nodes themselves, as ComfyUI describes them.

Run it after a name or a tooltip was changed: python tests/host/export_locales.py
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

from tests.helpers.host.comfy_server import PACK, Server  # noqa: E402

ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"


def our_nodes(server: Server) -> dict[str, dict]:
    """The pack's nodes, each by its id, as /object_info describes them."""
    known = server.get("/object_info")
    return {name: told for name, told in known.items() if told["python_module"] == "custom_nodes.flowcache"}


def inputs_of(told: dict) -> dict[str, dict]:
    """The options of each input of a node."""
    inputs = {**told["input"].get("required", {}), **told["input"].get("optional", {})}
    return {name: (described[1] if len(described) > 1 else {}) for name, described in inputs.items()}


def node_texts(told: dict) -> dict:
    """A node's names and tooltips in the form of a locale file."""
    texts: dict = {"display_name": told["display_name"], "description": told["description"]}
    inputs = {
        name: {"name": name} | ({"tooltip": options["tooltip"]} if options.get("tooltip") else {})
        for name, options in inputs_of(told).items()
    }
    if inputs:
        texts["inputs"] = inputs
    tooltips = told.get("output_tooltips") or [None] * len(told["output"])
    outputs = {
        str(index): {"name": name} | ({"tooltip": tooltip} if tooltip else {})
        for index, (name, kind, tooltip) in enumerate(zip(told["output_name"], told["output"], tooltips, strict=True))
        if name != kind  # the page names the others by their type
    }
    if outputs:
        texts["outputs"] = outputs
    return texts


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            texts = {name: node_texts(told) for name, told in sorted(our_nodes(server).items())}
        finally:
            server.stop()
    ENGLISH.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
