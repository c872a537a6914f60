"""What the pack's nodes say to people: as ComfyUI describes them, in the form of a locale file."""

from tests.helpers.host.comfy_server import PACK, Server

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
