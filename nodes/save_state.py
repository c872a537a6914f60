"""Save AR State (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.models.latent_spaces import pixel_size
from ..flowcache_core.storage.state import State, save_state
from .comfyui.states import FOLDER, described
from .comfyui.stream import OutputFile
from .comfyui.types import StateType
from .comfyui.widgets import schema


class SaveState(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheSaveState",
            inputs=[StateType.Input("state"), io.String.Input("filename_prefix", default="state")],
            outputs=[],
            found_by=("checkpoint", "continue", "save progress", "export state"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, state: State, filename_prefix: str) -> io.NodeOutput:
        file = OutputFile.new(f"{FOLDER}/{filename_prefix}", pixel_size(state.latents.shape), ".safetensors")
        try:
            save_state(state, file.path)
        finally:
            file.drop_empty()
        return io.NodeOutput(ui={"text": (f"{file.name}\n{described(state)}",), "states": file.results})
