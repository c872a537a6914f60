"""Helpers for node definitions that hold on old and new hosts."""

from dataclasses import fields

from comfy_api.latest import io


def advanced(widget):
    """Marks an input as rarely needed: the page folds it away, and an API call may leave it out."""
    widget.extra_dict["advanced"] = True  # as an argument it is an error on ComfyUI 0.3.64
    widget.optional = True
    return widget


def found_by(*words: str) -> dict:
    """Other words that find a node in the page's search; ComfyUI 0.3.64 does not take them."""
    return {"search_aliases": list(words)} if "search_aliases" in {field.name for field in fields(io.Schema)} else {}
