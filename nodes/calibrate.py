"""Calibrate FlowCache: finds out, once a model, which steps to recompute for which quality."""

from comfy_api.latest import io

from ..flowcache_core.calibration import calibrate_clips
from ..flowcache_core.models.families import family
from ..flowcache_core.schedule import ChunkSchedule
from ..flowcache_core.settings import Settings
from ..flowcache_core.storage.calibrations import calibration_path, save_calibration
from .comfyui import patch as host
from .comfyui.extend import Extension, Sampling, extend
from .comfyui.levels import chosen_levels
from .comfyui.progress import progress_text
from .comfyui.widgets import LARGEST_SEED, advanced, schema


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheCalibrate",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae"),
                io.Int.Input("seed", default=0, min=0, max=LARGEST_SEED),
                io.Int.Input("chunks", default=4, min=1, max=64),
                io.Float.Input("minutes", default=10.0, min=0.0, max=600.0),
                advanced(io.Int.Input("steps", default=0, min=0, max=1000)),
                advanced(io.Int.Input("width", default=0, min=0, max=8192, step=16)),
                advanced(io.Int.Input("height", default=0, min=0, max=8192, step=16)),
            ],
            outputs=[io.String.Output(display_name="text")],
            found_by=("tune", "quality", "speed up"),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, vae, seed, chunks, minutes, steps, width, height) -> io.NodeOutput:
        file = host.file_of(model)
        usual = family(host.family_of(model))
        steps = steps or usual.steps
        schedule = ChunkSchedule(chunks, steps, usual.lag if steps == usual.steps else steps)

        levels = chosen_levels(model, usual, steps, shift=0.0)
        how = Sampling(levels.each, usual.chunk_frames, schedule.lag, usual.solver(steps), usual.guidance, levels.first)
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

        path = save_calibration(calibrate_clips(schedule, clip, minutes, told=told), calibration_path(file), file)
        text = "\n".join([*lines, f"written to {path.name}"])
        return io.NodeOutput(text, ui={"text": [text]})
