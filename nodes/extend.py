"""Autoregressive Extend: a video, chunk after chunk, for as long as you like."""

from dataclasses import replace

from comfy_api.latest import io

from ..flowcache_core.checkpoints import MAGI_FAMILIES, wan_families
from ..flowcache_core.engine.from_video import STRENGTH
from ..flowcache_core.errors import UserError
from ..flowcache_core.models import families
from .comfyui import magi as host_magi
from .comfyui import patch as host
from .comfyui.checks import latent_stride, rounded_notes
from .comfyui.extend import Extended, Extension, Sampling, extend
from .comfyui.levels import chosen_levels, fixed_levels
from .comfyui.outputs import is_taken
from .comfyui.stream import workflow_metadata
from .comfyui.types import ReportType, ResumeType, StateType, StreamType
from .comfyui.widgets import LARGEST_SEED, advanced, schema

IMAGES = 4  # number of the output


class AutoregressiveExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheAutoregressiveExtend",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Int.Input("seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True),
                io.Int.Input("chunks", default=8, min=1, max=10000),
                io.Int.Input("steps", default=0, min=0, max=1000),
                io.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.1),
                io.Int.Input("frames_per_chunk", default=0, min=0, max=64),
                io.Int.Input("lag", default=-1, min=-1, max=1000),
                io.Int.Input("width", default=0, min=0, max=8192, step=16),
                io.Int.Input("height", default=0, min=0, max=8192, step=16),
                advanced(io.Combo.Input("solver", options=["auto", *families.SOLVERS], default="auto")),
                advanced(io.Combo.Input("attention", options=["auto", "causal", "joint"], default="auto")),
                advanced(io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1)),
                advanced(io.Float.Input("condition_noise", default=-1.0, min=-1.0, max=1.0, step=0.01)),
                io.Latent.Input("prefix", optional=True),
                io.Latent.Input("end", optional=True),
                StateType.Input("state", optional=True),
                StreamType.Input("stream", optional=True),
                ResumeType.Input("resume", optional=True),
                advanced(io.Combo.Input("family", options=["auto", *wan_families()], default="auto")),
                io.Vae.Input("vae", optional=True),
                io.Latent.Input("video", optional=True),
                advanced(io.Float.Input("strength", default=STRENGTH, min=0.0, max=1.0, step=0.01)),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                StateType.Output(display_name="state"),
                ReportType.Output(display_name="report"),
                io.String.Output(display_name="prompts"),
                io.Image.Output(display_name="images"),
            ],
            found_by=("long video", "extend video", "autoregressive", "video continuation", "infinite video"),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, seed, chunks, steps, guidance, frames_per_chunk, lag, width, height,
        solver, attention, shift, condition_noise, prefix, end, state, stream, resume, family, vae, video, strength,
    ) -> io.NodeOutput:  # fmt: skip
        if prefix is not None and state is not None:
            raise UserError(
                "Both a prefix and a state are connected; a state already holds what came before. Connect one."
            )
        if vae is not None and stream is not None:
            raise UserError(
                "Both a vae and a stream are connected, and either decodes the video: the stream into a file, the vae "
                "for the output 'images'. Connect one."
            )
        if vae is None and is_taken(cls.hidden, IMAGES):
            raise UserError("The output 'images' is connected, and nothing decodes them: connect a vae, too.")
        notes = [
            f"the noise mask of the {name} has no effect: its frames are kept as they are"
            for name, latent in (("prefix", prefix), ("end", end))
            if latent is not None and latent.get("noise_mask") is not None
        ]
        if video is not None and video.get("noise_mask") is not None:
            notes.append("the noise mask of the video has no effect: all of it is sampled at one strength")
        notes += rounded_notes(latent_stride(model), 0, width=width, height=height)
        model, missing = host.with_family(model, family, cls.hidden)
        notes += missing
        prefix, end, video = (None if latent is None else latent["samples"] for latent in (prefix, end, video))
        image = model.model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
        if prefix is None and state is None:
            prefix = image
        asked = Extension(
            positive, negative, seed, chunks, (width, height), prefix, end, state, stream, vae, resume,
            metadata=workflow_metadata(cls.hidden), node_id=cls.hidden.unique_id, video=video, strength=strength,
        )  # fmt: skip
        name = host.family_of(model)
        if name in MAGI_FAMILIES:
            host_magi.check_fixed(
                steps, end, frames_per_chunk=frames_per_chunk, lag=lag, solver=solver, attention=attention, shift=shift,
                condition_noise=condition_noise,
            )  # fmt: skip
            return _output(
                host_magi.extend(model, replace(asked, notes=[*notes, *fixed_levels(model)]), steps, guidance)
            )
        usual = families.family(name)
        steps = steps or usual.steps
        levels = chosen_levels(model, usual, steps, shift)
        how = Sampling(
            levels=levels.each,
            chunk_frames=frames_per_chunk or usual.chunk_frames,
            lag=min(usual.lag, steps) if lag < 0 else lag,
            solver=usual.solver(steps) if solver == "auto" else solver,
            scale=guidance or usual.guidance,
            first_levels=levels.first,
            seeing=usual.attention if attention == "auto" else attention,
            condition=usual.condition if condition_noise < 0 else condition_noise,
        )
        size = (width or usual.size[0], height or usual.size[1])
        return _output(extend(model, replace(asked, size=size, notes=[*notes, *levels.notes]), how))


def _output(result: Extended) -> io.NodeOutput:
    # Not among "images": the page would put a player over the live preview, and the stream's node has the video.
    shown = None if result.video is None else {"video": result.video.results}
    latent = {"samples": result.latent}
    return io.NodeOutput(latent, result.state, result.report, result.report.prompts, result.images, ui=shown)
