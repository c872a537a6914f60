"""What node definitions are made with; it holds on old and new hosts."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from comfy_api.latest import io

LARGEST_SEED = 2**64 - 1
ENGLISH = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"
TEXTS = json.loads(ENGLISH.read_text(encoding="utf-8"))


def schema(
    node_id: str,
    inputs: Sequence[io.Input],
    outputs: Sequence[io.Output],
    *,
    found_by: Sequence[str] = (),
    category: str = "FlowCache",
    **more,
) -> io.Schema:
    """A node's definition, with the name, the description and the tooltips that stand in the English locale file.

    Args:
        found_by: other words that find the node in the page's search; ComfyUI 0.3.64 does not take them.
        more: further fields of the host's schema.
    """
    texts = TEXTS[node_id]
    for one in inputs:
        one.tooltip = texts["inputs"][one.id].get("tooltip")
    for number, told in texts.get("outputs", {}).items():
        outputs[int(number)].tooltip = told.get("tooltip")
    if found_by and "search_aliases" in {field.name for field in fields(io.Schema)}:
        more["search_aliases"] = list(found_by)
    return io.Schema(
        node_id, texts["display_name"], category, [*inputs], [*outputs], description=texts["description"], **more
    )


def advanced(widget):
    """Marks an input as rarely needed: the page folds it away, and an API call may leave it out."""
    widget.extra_dict["advanced"] = True  # as an argument it is an error on ComfyUI 0.3.64
    widget.optional = True
    return widget
