"""Helpers for node definitions that hold on old and new hosts."""


def advanced(widget):
    """Marks an input as rarely needed: the page folds it away, and an API call may leave it out."""
    widget.extra_dict["advanced"] = True  # as an argument it is an error on ComfyUI 0.3.64
    widget.optional = True
    return widget
