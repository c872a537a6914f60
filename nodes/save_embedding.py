"""Save Text Embedding (FlowCache)."""

from comfy_api.latest import io

from .comfyui.embeddings import save_embedding
from .comfyui.widgets import schema


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheSaveEmbedding",
            inputs=[io.Conditioning.Input("conditioning"), io.String.Input("filename_prefix", default="prompt")],
            outputs=[],
            found_by=("export conditioning", "torchrun", "several gpus", "prompt to file"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list, filename_prefix: str) -> io.NodeOutput:
        file, described = save_embedding(conditioning, filename_prefix)
        return io.NodeOutput(ui={"text": (described,), "embeddings": file.results})
