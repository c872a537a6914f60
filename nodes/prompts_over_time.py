"""Prompts over Time (FlowCache)."""

from comfy_api.latest import io

from ..flowcache_core.demo.captions import embed_caption
from ..flowcache_core.prompts import captions, mix, parse
from .comfyui.captions import CHUNKS
from .comfyui.widgets import found_by

EXAMPLE = "0-3: a red circle\n6-: a blue square"


class PromptsOverTime(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCachePromptsOverTime",
            display_name="Prompts over Time (FlowCache)",
            category="FlowCache",
            description="A prompt for each part of a long video: one line a segment, with the chunks that it holds "
            "for. "
            "Chunks between two segments blend from one prompt to the other. For Autoregressive Extend and AR Sampler.",
            **found_by("prompt schedule", "prompt travel", "prompt blend", "multi prompt", "story", "timeline"),
            inputs=[
                io.String.Input(
                    "text",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="One line a segment: '0-3: a red circle', '4: …' for one chunk, '6-: …' to the end. Chunks "
                    "count from 0 at the beginning of the video. A vertical bar between two prompts mixes them, each "
                    "with its weight behind a '*', for example '*0.7'.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of your model; leave it unconnected for the demo model.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str, clip=None) -> io.NodeOutput:
        spans = parse(text)
        encoded = {caption: _encode(clip, caption) for caption in captions(spans)}
        embeddings = {caption: embedding for caption, (embedding, _) in encoded.items()}
        conditioning = []
        for span in spans:
            heaviest = max(span.weights, key=span.weights.get)
            more = encoded[heaviest][1] | {CHUNKS: (span.first, span.last)}
            conditioning.append([mix(embeddings, span.weights), more])
        return io.NodeOutput(conditioning)


def _encode(clip, caption: str) -> tuple:
    """A caption's embedding and what the encoder says beside it."""
    if clip is None:
        return embed_caption(caption), {}
    ((embedding, more),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return embedding, more
