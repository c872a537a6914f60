"""What other nodes take of a node, read off the prompt. A video that is streamed to disk is wanted, though none takes
anything of its run."""

from server import PromptServer

import nodes as host_nodes

EXTEND, REPORT = "FlowCacheAutoregressiveExtend", "FlowCacheReport"


def is_taken(hidden, output: int) -> bool:
    """Whether a node of the prompt takes one of this node's outputs.

    Args:
        hidden: the node's, with its prompt and unique_id.
        output: its number, from 0.
    """
    inputs = (node.get("inputs", {}) for node in (hidden.prompt or {}).values())
    return any([str(hidden.unique_id), output] == value for given in inputs for value in given.values())


def run_streams() -> None:
    """From now on the host also runs each Autoregressive Extend with a stream that none of its output nodes needs."""
    PromptServer.instance.add_on_prompt_handler(_with_reports)


def _with_reports(request: dict) -> dict:
    """The body of /prompt with a FlowCache Report behind each such node, as a user would put it.

    The host runs only what leads to an output node, and takes from its class whether a node is one: an Autoregressive
    Extend that always was would also run, or be refused, where a user left it unconnected.
    """
    graph = request.get("prompt")
    graph = {name: node for name, node in graph.items() if isinstance(node, dict)} if isinstance(graph, dict) else {}
    needed = _feeding(graph, [name for name, node in graph.items() if _is_output(node)])
    for name, node in graph.items():
        if node.get("class_type") == EXTEND and "stream" in _links(node) and name not in needed:
            request["prompt"][f"{name}.report"] = {"class_type": REPORT, "inputs": {"report": [name, 2]}}
    return request


def _feeding(graph: dict, names: list[str]) -> set[str]:
    """The named nodes and all they need."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in graph and name not in found:
            found.add(name)
            names += _links(graph[name]).values()
    return found


def _links(node: dict) -> dict[str, str]:
    """The nodes that its inputs are linked to."""
    inputs = node.get("inputs")
    given = inputs.items() if isinstance(inputs, dict) else ()
    return {key: value[0] for key, value in given if isinstance(value, list) and value and isinstance(value[0], str)}


def _is_output(node: dict) -> bool:
    known: dict = vars(host_nodes)["NODE_CLASS_MAPPINGS"]  # of the host; our own package has the same name
    return getattr(known.get(str(node.get("class_type"))), "OUTPUT_NODE", False)
