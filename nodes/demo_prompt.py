"""Demo Prompt (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.captions import embed_caption
from .comfyui.widgets import schema


class DemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheDemoPrompt",
            inputs=[io.String.Input("caption", default="a red circle and a blue square", dynamic_prompts=True)],
            outputs=[io.Conditioning.Output()],
            category="FlowCache/demo",
        )

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        return io.NodeOutput([[embed_caption(caption), {}]])
