"""Calibrate FlowCache: finds out, once a model, which steps to recompute for which quality."""

from comfy_api.latest import io

from ..flowcache_core.calibration import calibrate_clips
from ..flowcache_core.models.families import family
from ..flowcache_core.schedule import ChunkSchedule
from ..flowcache_core.settings import Settings
from ..flowcache_core.storage.calibrations import calibration_path, save_calibration
from .comfyui import inputs
from .comfyui import patch as host
from .comfyui.extend import Extension, Sampling, extend
from .comfyui.progress import progress_text
from .comfyui.widgets import advanced, found_by


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheCalibrate",
            display_name="Calibrate FlowCache",
            category="FlowCache",
            description="Runs a short clip of a model many times, finds the steps that are best recomputed, and writes "
            "which quality they give to a small file beside the model. "
            "FlowCache's preset 'quality' uses it from then on.",
            **found_by("tune", "quality", "speed up"),
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model, straight from its loader."),
                io.Conditioning.Input("positive", tooltip="What the clip shows: something typical of what you make."),
                io.Conditioning.Input("negative", tooltip="What it does not show; used when guidance is not 1."),
                io.Vae.Input("vae", tooltip="Clips are compared as they look, decoded."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the clip's noise."),
                io.Int.Input("chunks", default=4, min=1, max=64, tooltip="Chunks of the clip."),
                io.Float.Input(
                    "minutes",
                    default=10.0,
                    min=0.0,
                    max=600.0,
                    tooltip="Of searching; measuring comes on top. 0 only measures evenly spread steps.",
                ),
                advanced(
                    inputs.steps(
                        0,
                        0,
                        "Denoising steps of a chunk; 0: as recommended for the model. It holds for that number only.",
                    )
                ),
                advanced(inputs.pixels("width", 0, 0, "Pixels; 0: as recommended.")),
                advanced(inputs.pixels("height", 0, 0, "Pixels; 0: as recommended.")),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="What was measured, a line for each setting.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, vae, seed, chunks, minutes, steps=0, width=0, height=0
    ) -> io.NodeOutput:
        path = calibration_path(host.file_of(model))
        usual = family(host.family_of(model))
        steps = steps or usual.steps
        schedule = ChunkSchedule(chunks, steps, usual.lag if steps == usual.steps else steps)

        how = Sampling(
            usual.levels(steps),
            usual.chunk_frames,
            schedule.lag,
            usual.solver(steps),
            usual.guidance,
            usual.first_levels(steps),
        )
        size = (width or usual.size[0], height or usual.size[1])

        def clip(settings: Settings, number: int):
            """One clip for the search, and one with the next seed to be measured."""
            clip_seed = (seed + number) % 2**64
            asked = Extension(positive, negative, clip_seed, chunks, size, node_id=cls.hidden.unique_id)
            return vae.decode(extend(host.patched(model, settings, "calibration"), asked, how).latent)[None]

        lines: list[str] = []

        def told(line: str) -> None:
            lines.append(line)
            progress_text(line, cls.hidden.unique_id)

        save_calibration(calibrate_clips(schedule, clip, minutes, told=told), path)
        text = "\n".join([*lines, f"written to {path.name}"])
        return io.NodeOutput(text, ui={"text": [text]})
