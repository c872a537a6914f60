"""FlowCache for ComfyUI: long autoregressive video, faster, in bounded memory.

ComfyUI imports this file and asks it for the nodes. Anywhere else importing it does nothing.
"""

try:
    import comfy_api.latest  # noqa: F401
except ImportError:
    pass
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"  # the page finds a node's help in docs/ under it

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
