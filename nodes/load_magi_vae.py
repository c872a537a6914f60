"""Load MAGI-1 VAE (FlowCache)."""

from comfy_api.latest import io

from .comfyui.folders import file_names, file_path
from .comfyui.magi_model import magi_vae
from .comfyui.widgets import schema


class LoadMagiVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheLoadMagiVAE",
            inputs=[io.Combo.Input("vae_name", options=file_names("vae"))],
            outputs=[io.Vae.Output()],
            found_by=("magi", "magi-1"),
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(magi_vae(file_path("vae", vae_name)))
