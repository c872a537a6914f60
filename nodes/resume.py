"""Resume after Interrupt (FlowCache)."""

from comfy_api.latest import io

from .comfyui.resume import ResumeSettings
from .comfyui.types import ResumeType
from .comfyui.widgets import found_by


class Resume(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheResume",
            display_name="Resume after Interrupt (FlowCache)",
            category="FlowCache",
            description="Connect it to Autoregressive Extend: every finished chunk is kept on disk. After an "
            "interrupt or a crash, queue the same workflow again and the run goes on from there.",
            **found_by("checkpoint", "continue", "crash", "interrupt", "resume run", "autosave"),
            inputs=[
                io.Float.Input(
                    "limit_gb",
                    default=20.0,
                    min=0.1,
                    max=10000.0,
                    step=0.1,
                    tooltip="Space in ComfyUI's user folder (flowcache/runs) for all runs together; the ones not "
                    "used for longest are removed first. Without a history budget a long run needs much of it.",
                ),
            ],
            outputs=[ResumeType.Output(display_name="resume", tooltip="For Autoregressive Extend.")],
        )

    @classmethod
    def execute(cls, limit_gb: float) -> io.NodeOutput:
        return io.NodeOutput(ResumeSettings(int(limit_gb * 2**30)))
