"""Live Prompt (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.timeline import MOST_BLENDED, cleaned
from .comfyui.captions import encoded
from .comfyui.live import RUNS
from .comfyui.live_prompt import LivePrompt
from .comfyui.widgets import schema


class LivePromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheLivePrompt",
            inputs=[
                io.String.Input("text", default="a red circle", multiline=True, dynamic_prompts=True),
                io.Int.Input("blend", default=0, min=0, max=MOST_BLENDED),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.Conditioning.Output()],
            found_by=(
                "interactive",
                "steer",
                "change prompt while running",
                "live",
                "real time",
                "stop after this chunk",
            ),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> int:
        """Another one after each run that was stopped and can go on."""
        return RUNS.stopped(str(cls.hidden.unique_id))

    @classmethod
    def execute(cls, text: str, blend: int, clip) -> io.NodeOutput:
        caption = cleaned(text)
        embedding, said = encoded(clip, caption)
        prompt = LivePrompt(caption, blend, str(cls.hidden.unique_id), clip, embedding, said)
        return io.NodeOutput(prompt.conditioning)
