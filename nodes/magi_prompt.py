"""MAGI-1 Prompt (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.models.magi.text import clean_prompt
from .comfyui.magi_text import encode
from .comfyui.widgets import advanced, schema


class MagiPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheMagiPrompt",
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                advanced(io.Boolean.Input("high_quality", default=True)),
                advanced(io.Combo.Input("beginning", options=["free", "static", "dynamic"], default="free")),
                advanced(io.Combo.Input("style", options=["free", "3d", "2d"], default="free")),
            ],
            outputs=[io.Conditioning.Output()],
            found_by=("magi", "magi-1", "t5 text encode"),
        )

    @classmethod
    def execute(cls, clip, text: str, high_quality: bool, beginning: str, style: str) -> io.NodeOutput:
        tokens = ["hq"] * high_quality + [name for name in (beginning, style) if name != "free"]
        return io.NodeOutput(encode(clip, clean_prompt(text), tuple(tokens)))
