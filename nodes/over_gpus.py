"""FlowCache over GPUs: one video by several GPUs of this machine."""

from comfy_api.latest import io

from .comfyui import patch as host
from .comfyui.gpus import SCHEMES, over_gpus
from .comfyui.widgets import advanced, schema


class FlowCacheOverGPUs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheOverGPUs",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("gpus", default=0, min=0, max=64),
                advanced(io.Combo.Input("scheme", options=list(SCHEMES), default="auto")),
            ],
            outputs=[io.Model.Output()],
            found_by=("multi gpu", "multigpu", "distributed", "parallel", "ulysses", "several gpus"),
        )

    @classmethod
    def execute(cls, model, gpus, scheme) -> io.NodeOutput:
        return io.NodeOutput(over_gpus(host.patched_or_off(model), gpus, scheme))
