"""Compare Videos (FlowCache)."""

import numpy as np
import torch
from comfy_api.latest import io

from ..flowcache_core.media.likeness import common, likeness, side_by_side, wipe
from ..flowcache_core.media.pictures import likeness_picture
from .comfyui.widgets import schema

VIEWS = {"side by side": side_by_side, "wipe": wipe}


class CompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheCompareVideos",
            inputs=[
                io.Image.Input("first"),
                io.Image.Input("second"),
                io.Combo.Input("view", options=list(VIEWS), default="side by side"),
            ],
            outputs=[
                io.Image.Output(display_name="video"),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="plot"),
            ],
            found_by=("compare", "psnr", "ssim", "side by side", "wipe", "difference", "quality"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, first: torch.Tensor, second: torch.Tensor, view: str) -> io.NodeOutput:
        lengths = (len(first), len(second))
        first, second = common(first[..., :3], second[..., :3])
        found = likeness(first, second)
        text = found.text()
        if lengths[0] != lengths[1]:
            text += f"\nThe videos have {lengths[0]} and {lengths[1]} frames; the longer one was cut."
        plot = np.asarray(likeness_picture(found).convert("RGB"), dtype=np.float32) / 255.0
        return io.NodeOutput(VIEWS[view](first, second), text, torch.from_numpy(plot)[None], ui={"text": (text,)})
