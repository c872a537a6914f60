"""Load Demo VAE (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.vae import load_vae
from .comfyui.models import video_vae
from .comfyui.widgets import schema


class LoadDemoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("FlowCacheLoadDemoVAE", inputs=[], outputs=[io.Vae.Output()], category="FlowCache/demo")

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(video_vae(load_vae()))
