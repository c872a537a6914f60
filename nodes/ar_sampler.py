"""AR Sampler (FlowCache): our engine as a SAMPLER."""

from comfy_api.latest import io

from ..flowcache_core.models.families import SOLVERS
from .comfyui.sampler import ARSampler
from .comfyui.widgets import advanced, schema


class ARSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheARSampler",
            inputs=[
                io.Int.Input("frames_per_chunk", default=3, min=1, max=64),
                io.Int.Input("lag", default=16, min=0, max=1000),
                io.Combo.Input("solver", options=list(SOLVERS), default="euler"),
                advanced(io.Combo.Input("attention", options=["causal", "joint", "rolling"], default="causal")),
            ],
            outputs=[io.Sampler.Output()],
            found_by=("autoregressive sampler", "diffusion forcing sampler", "magi", "skyreels"),
        )

    @classmethod
    def execute(cls, frames_per_chunk: int, lag: int, solver: str, attention: str) -> io.NodeOutput:
        return io.NodeOutput(ARSampler(frames_per_chunk, lag, solver, attention))
