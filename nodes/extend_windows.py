"""Extend in Windows: a long video as SkyReels-V2's upstream makes it."""

from comfy_api.latest import io

from ..flowcache_core.models.families import family
from .comfyui import patch as host
from .comfyui.checks import latent_stride, rounded_notes
from .comfyui.extend import Extension, Sampling
from .comfyui.levels import chosen_levels
from .comfyui.widgets import LARGEST_SEED, advanced, schema
from .comfyui.windows import extend_in_windows


class ExtendInWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheExtendInWindows",
            inputs=[
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Int.Input("seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True),
                io.Int.Input("frames", default=257, min=1, max=100001, step=4),
                io.Int.Input("window", default=97, min=5, max=1025, step=4),
                io.Int.Input("overlap", default=17, min=1, max=1021, step=4),
                io.Int.Input("width", default=960, min=16, max=8192, step=16),
                io.Int.Input("height", default=544, min=16, max=8192, step=16),
                advanced(io.Int.Input("steps", default=50, min=1, max=1000)),
                advanced(io.Float.Input("guidance", default=6.0, min=0.0, max=100.0, step=0.1)),
                advanced(io.Float.Input("shift", default=8.0, min=0.0, max=100.0, step=0.1)),
                advanced(io.Int.Input("lag", default=0, min=0, max=1000)),
                advanced(io.Float.Input("condition_noise", default=0.02, min=0.0, max=1.0, step=0.01)),
                io.Image.Input("start", optional=True),
            ],
            outputs=[io.Image.Output(tooltip="All frames.")],
            found_by=("long video", "skyreels", "diffusion forcing", "sliding window"),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, seed, frames, window, overlap, width, height,
        steps, guidance, shift, lag, condition_noise, start,
    ) -> io.NodeOutput:  # fmt: skip
        usual = family(host.family_of(model))
        levels = chosen_levels(model, usual, steps, shift)
        how = Sampling(
            levels.each, usual.chunk_frames, lag, usual.solver(steps), guidance, seeing="joint",
            condition=condition_noise,
        )  # fmt: skip
        asked = Extension(
            positive,
            negative,
            seed,
            0,
            (width, height),
            node_id=cls.hidden.unique_id,
            notes=[*levels.notes, *rounded_notes(latent_stride(model), 0, width=width, height=height)],
        )
        return io.NodeOutput(extend_in_windows(model, vae, asked, how, start, frames, window, overlap))
