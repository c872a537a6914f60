"""Prompts over Time (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.prompts import captions, parse
from .comfyui.captions import encoded, span_conditions
from .comfyui.widgets import schema

EXAMPLE = "0-3: a red circle\n6-: a blue square"


class PromptsOverTime(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCachePromptsOverTime",
            inputs=[
                io.String.Input("text", default=EXAMPLE, multiline=True, dynamic_prompts=True),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.Conditioning.Output()],
            found_by=("prompt schedule", "prompt travel", "prompt blend", "multi prompt", "story", "timeline"),
        )

    @classmethod
    def execute(cls, text: str, clip) -> io.NodeOutput:
        spans = parse(text)
        known = {caption: encoded(clip, caption) for caption in captions(spans)}
        return io.NodeOutput([[*one] for span in spans for one in span_conditions(span, known)])
