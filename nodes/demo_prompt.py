"""Demo Prompt (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.captions import WORDS, embed_caption


class DemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheDemoPrompt",
            display_name="Demo Prompt (FlowCache)",
            category="FlowCache/demo",
            description="A caption for the demo model, which needs no text encoder: every word has a fixed vector. "
            "Leave it empty for the negative prompt.",
            inputs=[
                io.String.Input(
                    "caption",
                    default="a red circle and a blue square",
                    tooltip="One or two shapes, for example 'a red circle and a blue square'. "
                    f"Words: {', '.join(WORDS)}.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        return io.NodeOutput([[embed_caption(caption), {}]])
