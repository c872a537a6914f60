"""Load AR Video Model (FlowCache)."""

import logging

import folder_paths
import torch
from comfy_api.latest import io

from ..flowcache_core import checkpoints
from ..flowcache_core.demo import NETWORK_FILE
from ..flowcache_core.errors import UserError
from . import host

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
        families = ["auto", *(name for name in checkpoints.FAMILIES if name not in ("magi", "rolling"))]
        return io.Schema(
            node_id="FlowCacheLoadARVideoModel",
            display_name="Load AR Video Model (FlowCache)",
            category="FlowCache",
            description="Loads an autoregressive video model: causal Wan (Self-Forcing, Causal-Forcing, CausVid), "
            "SkyReels-V2, or the small demo model that ships with this pack.",
            search_aliases=["self-forcing", "causal forcing", "causvid", "skyreels", "diffusion forcing", "autoregressive"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[DEMO, *folder_paths.get_filename_list("diffusion_models")],
                    tooltip="A file of ComfyUI's diffusion_models folder, or the demo model, which needs no download.",
                ),
                io.Combo.Input(
                    "family",
                    options=families,
                    default="auto",
                    tooltip="What the model was trained as. 'auto' reads the file; where several families share one "
                    "layout (Self-Forcing, plain Wan 2.1, some SkyReels-V2) choose it here.",
                ),
                io.Combo.Input(
                    "weight_type",
                    options=list(WEIGHT_TYPES),
                    default="default",
                    tooltip="Type of the weights in memory. 'default' lets ComfyUI choose for your device.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model_name: str, family: str, weight_type: str) -> io.NodeOutput:
        path = NETWORK_FILE if model_name == DEMO else folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        info, weights = checkpoints.load(path, family)
        for warning in info.warnings:
            logging.warning("FlowCache: %s", warning)
        if info.config is None:
            raise UserError(f"'{model_name}' is a {checkpoints.FAMILIES[info.family]} file, which this node cannot run yet.")
        causal = info.family in checkpoints.CAUSAL_FAMILIES
        model = host.load_wan(weights, info.config, causal, WEIGHT_TYPES[weight_type])
        model.model_options.setdefault("transformer_options", {})[host.FAMILY] = info.family
        return io.NodeOutput(model)
