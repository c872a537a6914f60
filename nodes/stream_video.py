"""Stream Video to Disk (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.media.encoding import Codec, Encoding, Quality
from .comfyui.stream import StreamSettings, check_prefix, encoding_inputs, sound_of
from .comfyui.types import StreamType
from .comfyui.widgets import advanced, schema


class StreamVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheStreamVideo",
            inputs=[
                io.Vae.Input("vae"),
                io.String.Input("filename_prefix", default="flowcache/video"),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, round=0.001),
                advanced(io.Boolean.Input("keep_latents", default=True)),
                *encoding_inputs(),
            ],
            outputs=[StreamType.Output(display_name="stream")],
            found_by=(
                "save video",
                "stream video",
                "write video",
                "long video to disk",
                "infinite video",
                "audio",
                "av1",
            ),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, vae, filename_prefix: str, fps: float, keep_latents: bool, codec: Codec, quality: Quality, audio
    ) -> io.NodeOutput:
        check_prefix(filename_prefix)
        how, node_id = Encoding(codec, quality), cls.hidden.unique_id
        return io.NodeOutput(StreamSettings(vae, filename_prefix, fps, keep_latents, node_id, how, sound_of(audio)))
