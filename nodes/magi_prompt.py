"""MAGI-1 Prompt (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.models.magi.text import clean_prompt
from .comfyui.magi_text import encode
from .comfyui.widgets import advanced, found_by


class MagiPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheMagiPrompt",
            display_name="MAGI-1 Prompt (FlowCache)",
            category="FlowCache",
            description="A prompt for MAGI-1: cleaned as its training captions were, encoded by T5 v1.1 XXL, with "
            "MAGI-1's special tokens in front when it is sampled. Leave it empty for the negative input of "
            "Autoregressive Extend.",
            **found_by("magi", "magi-1", "t5 text encode"),
            inputs=[
                io.Clip.Input("clip", tooltip="T5 v1.1 XXL: CLIPLoader with type 'mochi'."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video shows, in English: upper case, links, markup and Chinese signs are taken "
                    "out, and the first 800 tokens are read.",
                ),
                advanced(
                    io.Boolean.Input(
                        "high_quality", default=True, tooltip="Asks for quality, as upstream's examples do."
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "beginning",
                        options=["free", "static", "dynamic"],
                        default="free",
                        tooltip="Whether the first frames are still or in motion.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "style",
                        options=["free", "3d", "2d"],
                        default="free",
                        tooltip="3d: a rendered model; 2d: drawn animation.",
                    )
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, clip, text: str, high_quality: bool = True, beginning: str = "free", style: str = "free"
    ) -> io.NodeOutput:
        tokens = ["hq"] * high_quality + [name for name in (beginning, style) if name != "free"]
        return io.NodeOutput(encode(clip, clean_prompt(text), tuple(tokens)))
