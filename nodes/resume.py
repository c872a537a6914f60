"""Resume after Interrupt (FlowCache)."""

from comfy_api.latest import io

from .comfyui.resume import ResumeSettings
from .comfyui.types import ResumeType
from .comfyui.widgets import advanced, schema

GO_ON = "go on unkept"


class Resume(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheResume",
            inputs=[
                io.Float.Input("limit_gb", default=20.0, min=0.1, max=10000.0, step=0.1),
                advanced(io.Combo.Input("on_full_disk", options=["stop", GO_ON], default="stop")),
            ],
            outputs=[ResumeType.Output(display_name="resume")],
            found_by=("checkpoint", "continue", "crash", "interrupt", "resume run", "autosave"),
        )

    @classmethod
    def execute(cls, limit_gb: float, on_full_disk: str) -> io.NodeOutput:
        return io.NodeOutput(ResumeSettings(int(limit_gb * 2**30), goes_on=on_full_disk == GO_ON))
