"""Save Video with Report (FlowCache)."""

import torch
from comfy_api.latest import io

from ..flowcache_core.media.encoding import Codec, Encoding, Quality
from ..flowcache_core.media.video import frames_of
from .comfyui.progress import progress_text
from .comfyui.stream import (
    OutputFile,
    encoding_inputs,
    new_stream,
    report_metadata,
    sound_of,
    workflow_metadata,
)
from .comfyui.types import ReportType
from .comfyui.widgets import schema

AT_ONCE = 16  # frames


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheSaveVideo",
            inputs=[
                io.Image.Input("images"),
                ReportType.Input("report", optional=True),
                io.String.Input("filename_prefix", default="flowcache/video"),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, round=0.001),
                *encoding_inputs(),
            ],
            outputs=[],
            found_by=("save video", "export video", "mp4", "metadata", "av1", "png", "image sequence", "audio"),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, images: torch.Tensor, report, filename_prefix: str, fps: float, codec: Codec, quality: Quality, audio
    ) -> io.NodeOutput:
        how, sound = Encoding(codec, quality), sound_of(audio)
        file = OutputFile.new(filename_prefix, (images.shape[2], images.shape[1]), how.ending)
        stream = new_stream(file, fps, workflow_metadata(cls.hidden), how)
        try:
            for part in images[..., :3].split(AT_ONCE):
                stream.write(frames_of(2 * part.movedim(-1, 0) - 1))
            stream.finish(report_metadata(report) if report else None, sound)
            if stream.warning:
                progress_text(stream.warning, cls.hidden.unique_id)
        finally:
            stream.close()
            file.drop_empty()
        return io.NodeOutput(ui=file.shown)
