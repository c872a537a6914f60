"""Get Video Frames (FlowCache)."""

import torch
from comfy_api.latest import InputImpl, io

from ..flowcache_core.media.video import frame_rate, read_video
from .comfyui.widgets import schema


class ReadVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheReadVideo",
            inputs=[io.Video.Input("video")],
            outputs=[io.Image.Output(display_name="images"), io.Float.Output(display_name="fps")],
            found_by=("video to images", "get video components", "load video", "frames", "continue a video", "colours"),
        )

    @classmethod
    def execute(cls, video) -> io.NodeOutput:
        if not isinstance(video, InputImpl.VideoFromFile):  # frames that were never encoded
            components = video.get_components()
            return io.NodeOutput(components.images, float(components.frame_rate))
        trimmed = hasattr(video, "get_active_trim_window")  # not on ComfyUI 0.3.64
        start, duration = video.get_active_trim_window() if trimmed else (0.0, 0.0)
        frames = read_video(video.get_stream_source(), start, duration)
        return io.NodeOutput(torch.from_numpy(frames).float() / 255, float(frame_rate(video.get_stream_source())))
