"""Load Demo VAE (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.vae import load_vae
from .comfyui.models import video_vae


class LoadDemoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLoadDemoVAE",
            display_name="Load Demo VAE (FlowCache)",
            category="FlowCache/demo",
            description="The demo model's VAE, for ComfyUI's VAE Decode and VAE Encode. It ships with this pack.",
            inputs=[],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(video_vae(load_vae()))
