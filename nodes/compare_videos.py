"""Compare Videos (FlowCache)."""

import numpy as np
import torch
from comfy_api.latest import io

from ..flowcache_core.media.likeness import common, likeness, side_by_side, wipe
from ..flowcache_core.media.pictures import likeness_picture
from .comfyui.widgets import found_by

VIEWS = {"side by side": side_by_side, "wipe": wipe}


class CompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheCompareVideos",
            display_name="Compare Videos (FlowCache)",
            category="FlowCache",
            description="Shows two videos next to each other or in one picture, and measures how alike they are: "
            "PSNR and "
            "SSIM of every frame. For example the same seed with and without FlowCache.",
            **found_by("compare", "psnr", "ssim", "side by side", "wipe", "difference", "quality"),
            inputs=[
                io.Image.Input("first", tooltip="The frames of a video, for example without FlowCache."),
                io.Image.Input("second", tooltip="The frames of another one of the same size."),
                io.Combo.Input(
                    "view",
                    options=list(VIEWS),
                    default="side by side",
                    tooltip="side by side: the first left, the second right; wipe: in one picture, the first on the "
                    "left of "
                    "a line that moves to and fro.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="video", tooltip="For Create Video."),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="plot", tooltip="PSNR and SSIM of every frame."),
            ],
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
