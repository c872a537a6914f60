"""Load MAGI-1 VAE (FlowCache)."""

from comfy_api.latest import io

from .comfyui.folders import file_names, file_path
from .comfyui.magi_model import magi_vae
from .comfyui.widgets import found_by


class LoadMagiVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLoadMagiVAE",
            display_name="Load MAGI-1 VAE (FlowCache)",
            category="FlowCache",
            description="MAGI-1's VAE, for ComfyUI's VAE Decode and VAE Encode, tiled or not.",
            **found_by("magi", "magi-1"),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=file_names("vae"),
                    tooltip="Put SandAI's ckpt/vae folder (weights and config.json) into models/vae, or a file that "
                    "`python -m flowcache_core convert` made of it.",
                )
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(magi_vae(file_path("vae", vae_name)))
