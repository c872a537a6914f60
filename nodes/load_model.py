"""Load AR Video Model (FlowCache)."""

from functools import partial

import torch
from comfy_api.latest import io

from ..flowcache_core.demo import NETWORK_FILE
from ..flowcache_core.models.families import FAMILIES
from .comfyui.folders import file_names, file_path, model_folders
from .comfyui.models import load_model
from .comfyui.progress import progress_text
from .comfyui.widgets import advanced, schema

FOLDER = "diffusion_models"
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
        return schema(
            "FlowCacheLoadARVideoModel",
            inputs=[
                io.Combo.Input("model_name", options=[DEMO, *file_names(FOLDER), *model_folders(FOLDER)]),
                io.Combo.Input("family", options=["auto", *FAMILIES], default="auto"),
                io.Combo.Input("weight_type", options=list(WEIGHT_TYPES), default="default"),
                advanced(io.Int.Input("fps", default=24, min=1, max=120)),
            ],
            outputs=[io.Model.Output()],
            found_by=(
                "self-forcing", "causal forcing", "causvid", "skyreels", "diffusion forcing", "magi", "autoregressive",
            ),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name: str, family: str, weight_type: str, fps: int) -> io.NodeOutput:
        path = NETWORK_FILE if model_name == DEMO else file_path(FOLDER, model_name)
        warn = partial(progress_text, node_id=cls.hidden.unique_id)
        return io.NodeOutput(load_model(str(path), family, WEIGHT_TYPES[weight_type], fps, on_warning=warn))
