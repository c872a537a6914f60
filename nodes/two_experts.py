"""Two Experts: the two networks of Wan 2.2 A14B as one model."""

from comfy_api.latest import io

from ..flowcache_core.models.experts import BOUNDARY
from .comfyui.experts import two_experts
from .comfyui.widgets import advanced, schema


class TwoExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheTwoExperts",
            inputs=[
                io.Model.Input("high_noise"),
                io.Model.Input("low_noise"),
                advanced(io.Float.Input("boundary", default=BOUNDARY, min=0.0, max=1.0, step=0.005)),
            ],
            outputs=[io.Model.Output()],
            found_by=("wan 2.2", "a14b", "high noise", "low noise", "mixture of experts"),
        )

    @classmethod
    def execute(cls, high_noise, low_noise, boundary) -> io.NodeOutput:
        return io.NodeOutput(two_experts(high_noise, low_noise, boundary))
