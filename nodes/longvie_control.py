"""LongVie Control: the picture and the videos that lead LongVie 2."""

from comfy_api.latest import io

from ..flowcache_core.errors import UserError
from ..flowcache_core.models.longvie import leads
from .comfyui.longvie import Control, led
from .comfyui.widgets import schema


class LongVieControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheLongVieControl",
            inputs=[
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.ClipVision.Input("clip_vision"),
                io.Image.Input("start"),
                io.Image.Input("dense"),
                io.Image.Input("sparse"),
            ],
            outputs=[io.Model.Output()],
            found_by=("longvie", "depth", "tracks", "control video", "world model"),
        )

    @classmethod
    def execute(cls, model, vae, clip_vision, start, dense, sparse) -> io.NodeOutput:
        if not leads(model.model.diffusion_model):
            raise UserError(
                "The model has no control layers of LongVie 2; load its folder with Load AR Video Model (FlowCache)."
            )
        return io.NodeOutput(led(model, Control(vae, clip_vision, start, dense, sparse)))
