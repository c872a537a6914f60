"""AR Sampler (FlowCache): our engine as a SAMPLER."""

from comfy_api.latest import io

from ..flowcache_core.models.families import SOLVERS
from .comfyui.sampler import ARSampler
from .comfyui.widgets import advanced, found_by


class ARSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheARSampler",
            display_name="AR Sampler (FlowCache)",
            category="FlowCache",
            description="Samples a video chunk by chunk, for SamplerCustomAdvanced: noise, sigmas and guider stay "
            "ComfyUI's. Put a FlowCache node before the guider to make it faster.",
            **found_by("autoregressive sampler", "diffusion forcing sampler", "magi", "skyreels"),
            inputs=[
                io.Int.Input(
                    "frames_per_chunk",
                    default=3,
                    min=1,
                    max=64,
                    tooltip="Latent frames that are denoised together, as the model was trained: 3 for the demo model "
                    "and chunkwise causal Wan, 1 for framewise, 5 for SkyReels-V2.",
                ),
                io.Int.Input(
                    "lag",
                    default=16,
                    min=0,
                    max=1000,
                    tooltip="Steps that a chunk is ahead of the next. 16 of 64 for the demo model, 5 of 50 for "
                    "SkyReels-V2; the number of steps or more is one chunk after the other; 0 all chunks together.",
                ),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="euler",
                    tooltip="euler for the demo model, renoise for few-step causal models (Self-Forcing), "
                    "skyreels unipc for SkyReels-V2.",
                ),
                advanced(
                    io.Combo.Input(
                        "attention",
                        options=["causal", "joint", "rolling"],
                        default="causal",
                        tooltip="causal: chunk by chunk over the history; joint: all chunks in every forward "
                        "(SkyReels-V2 without acceleration); rolling: the active chunks together (Rolling Forcing).",
                    )
                ),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, frames_per_chunk: int, lag: int, solver: str, attention: str = "causal") -> io.NodeOutput:
        return io.NodeOutput(ARSampler(frames_per_chunk, lag, solver, attention))
