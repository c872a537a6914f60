"""Load AR State (FlowCache)."""

from pathlib import Path

from comfy_api.latest import io

from ..flowcache_core.storage.state import load_state
from .comfyui.folders import file_names, file_path
from .comfyui.progress import progress_text
from .comfyui.states import FOLDER, described
from .comfyui.types import StateType
from .comfyui.widgets import schema


class LoadState(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheLoadState",
            inputs=[io.Combo.Input("state_name", options=file_names(FOLDER))],
            outputs=[StateType.Output(display_name="state")],
            found_by=("checkpoint", "continue", "resume", "import state"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, state_name: str):
        """Tells the host when the file has changed."""
        found = Path(file_path(FOLDER, state_name)).stat()
        return found.st_mtime_ns, found.st_size

    @classmethod
    def execute(cls, state_name: str) -> io.NodeOutput:
        state = load_state(file_path(FOLDER, state_name))
        progress_text(described(state), cls.hidden.unique_id)
        return io.NodeOutput(state)
