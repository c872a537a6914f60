"""Which file a model comes from, where its loader does not say it: read off the prompt."""

from pathlib import Path

import folder_paths

FOLDERS = ("unet_gguf", "diffusion_models", "unet")


def loaded_file(hidden, ending: str) -> Path | None:
    """Follows a node's model input up the prompt, to the first node that names a file with this ending.

    Args:
        hidden: the node's, with its prompt and unique_id.
    """
    prompt = hidden.prompt or {}
    node, seen = prompt.get(str(hidden.unique_id)), set()
    while node is not None:
        inputs = node.get("inputs", {})
        for value in inputs.values():
            if isinstance(value, str) and value.lower().endswith(ending) and (path := _full_path(value)):
                return path
        links = [value for name, value in inputs.items() if name.startswith("model") and isinstance(value, list)]
        above = str(links[0][0]) if links and links[0] else ""
        if above in seen:
            return None
        seen.add(above)
        node = prompt.get(above)
    return None


def _full_path(name: str) -> Path | None:
    for folder in FOLDERS:
        if folder in folder_paths.folder_names_and_paths and (path := folder_paths.get_full_path(folder, name)):
            return Path(path)
    return None
