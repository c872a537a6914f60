"""Prompts over Time (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.captions import embed_caption
from ..flowcache_core.prompts import Blend, captions, parse
from .comfyui.captions import BLEND, CHUNKS
from .comfyui.widgets import schema

EXAMPLE = "0-3: a red circle\n6-: a blue square"


class PromptsOverTime(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCachePromptsOverTime",
            inputs=[
                io.String.Input("text", default=EXAMPLE, multiline=True, dynamic_prompts=True),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.Conditioning.Output()],
            found_by=("prompt schedule", "prompt travel", "prompt blend", "multi prompt", "story", "timeline"),
        )

    @classmethod
    def execute(cls, text: str, clip) -> io.NodeOutput:
        spans = parse(text)
        encoded = {caption: _encode(clip, caption) for caption in captions(spans)}
        conditioning = []
        for span in spans:
            shown = {caption: encoded[caption][0] for caption in captions([span])}
            for first, last, weights in span.nearest:
                embedding, said = encoded[max(weights, key=weights.get)]
                more = said | {CHUNKS: (first, last)}
                if len(shown) > 1:
                    more[BLEND] = Blend(span, shown, embedding)
                conditioning.append([embedding, more])
        return io.NodeOutput(conditioning)


def _encode(clip, caption: str) -> tuple:
    """A caption's embedding and what the encoder says beside it."""
    if clip is None:
        return embed_caption(caption), {}
    ((embedding, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return embedding, more
