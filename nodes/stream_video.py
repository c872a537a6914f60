"""Stream Video to Disk (FlowCache)."""

from comfy_api.latest import io

from .comfyui import inputs
from .comfyui.stream import StreamSettings, check_prefix
from .comfyui.types import StreamType
from .comfyui.widgets import advanced, found_by


class StreamVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheStreamVideo",
            display_name="Stream Video to Disk (FlowCache)",
            category="FlowCache",
            description="Connect it to Autoregressive Extend, which then runs though nothing else needs it: every "
            "finished chunk is decoded, shown and written to one mp4 in ComfyUI's output folder while the run goes on. "
            "An interrupted file still plays. The workflow, the settings and the report are written into it.",
            **found_by("save video", "stream video", "write video", "long video to disk", "infinite video"),
            inputs=[
                io.Vae.Input("vae", tooltip="Decodes the chunks. Wan's and the demo's go on without a seam."),
                inputs.filename_prefix(),
                inputs.fps(),
                advanced(
                    io.Boolean.Input(
                        "keep_latents",
                        default=True,
                        tooltip="Also hold all latents in memory for the latent output. Off: only the last chunk's, "
                        "so that memory does not grow with the length of the video.",
                    )
                ),
            ],
            outputs=[StreamType.Output(display_name="stream", tooltip="For Autoregressive Extend.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, filename_prefix: str, fps: float, keep_latents: bool = True) -> io.NodeOutput:
        check_prefix(filename_prefix)
        return io.NodeOutput(StreamSettings(vae, filename_prefix, fps, keep_latents, cls.hidden.unique_id))
