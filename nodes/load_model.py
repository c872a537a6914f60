"""Load AR Video Model (FlowCache)."""

import torch
from comfy_api.latest import io

from ..flowcache_core.demo import NETWORK_FILE
from ..flowcache_core.models.families import FAMILIES
from .comfyui.folders import file_names, file_path
from .comfyui.models import load_model
from .comfyui.progress import progress_text
from .comfyui.widgets import advanced, found_by

DEMO = "demo model (ships with FlowCache)"
WEIGHT_TYPES = {
    "default": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class LoadARVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        families = ["auto", *FAMILIES]
        return io.Schema(
            node_id="FlowCacheLoadARVideoModel",
            display_name="Load AR Video Model (FlowCache)",
            category="FlowCache",
            description="Loads an autoregressive video model: causal Wan (Self-Forcing, Causal-Forcing, CausVid), "
            "SkyReels-V2, MAGI-1, or the small demo model that ships with this pack.",
            **found_by(
                "self-forcing", "causal forcing", "causvid", "skyreels", "diffusion forcing", "magi", "autoregressive"
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[DEMO, *file_names("diffusion_models")],
                    tooltip="A file of ComfyUI's diffusion_models folder, or the demo model, which needs no download.",
                ),
                io.Combo.Input(
                    "family",
                    options=families,
                    default="auto",
                    tooltip="What the model was trained as. 'auto' reads the file; where several families share one "
                    "layout (Self-Forcing, plain Wan 2.1, some SkyReels-V2; MAGI-1 base and distilled) choose it here.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="default",
                    tooltip="Type of the weights in memory. 'default' lets ComfyUI choose for your device.",
                ),
                advanced(
                    io.Int.Input(
                        "fps",
                        default=24,
                        min=1,
                        max=120,
                        tooltip="Frames a second the video is made for. Only SkyReels-V2's 1.3B is told: it knows 16 "
                        "and 24.",
                    )
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name: str, family: str, weight_type: str, fps: int = 24) -> io.NodeOutput:
        path = NETWORK_FILE if model_name == DEMO else file_path("diffusion_models", model_name)

        def warn(warning: str) -> None:
            progress_text(warning, cls.hidden.unique_id)

        return io.NodeOutput(load_model(str(path), family, WEIGHT_TYPES[weight_type], fps, on_warning=warn))
