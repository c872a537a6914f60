"""Extend in Windows: a long video as SkyReels-V2's upstream makes it."""

from comfy_api.latest import io

from .comfyui import inputs
from .comfyui.extend import Extension
from .comfyui.widgets import advanced, found_by
from .comfyui.windows import Windows, WindowSampling, extend_in_windows


class ExtendInWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheExtendInWindows",
            display_name="Extend in Windows",
            category="FlowCache",
            description="A long video as SkyReels-V2's upstream makes it: window after window, each begun with the "
            "last frames of the one before, which are encoded anew. All frames of a window see each other, and "
            "nothing is reused. Autoregressive Extend makes long videos without decoding in between.",
            **found_by("long video", "skyreels", "diffusion forcing", "sliding window"),
            inputs=[
                io.Model.Input("model", tooltip="SkyReels-V2 diffusion forcing."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE; it decodes every window and encodes its last frames."),
                io.Conditioning.Input("positive", tooltip="What the video shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                inputs.seed("Each window counts on from it."),
                io.Int.Input(
                    "frames",
                    default=257,
                    min=1,
                    max=100001,
                    step=4,
                    tooltip="Frames of the video, those taken over from a start included: 257 for 10 s, 737 for 30 s "
                    "at 24 frames a second.",
                ),
                io.Int.Input(
                    "window",
                    default=97,
                    min=5,
                    max=1025,
                    step=4,
                    tooltip="Frames of a window: 97 for the 540P models, 121 for 720P.",
                ),
                io.Int.Input(
                    "overlap",
                    default=17,
                    min=1,
                    max=1021,
                    step=4,
                    tooltip="Frames that a window takes over from the one before.",
                ),
                inputs.pixels("width", 960, 16, "Pixels."),
                inputs.pixels("height", 544, 16, "Pixels."),
                advanced(inputs.steps(50, 1, "Denoising steps of a chunk.")),
                advanced(inputs.guidance(6.0, "Scale of classifier-free guidance.")),
                advanced(inputs.shift(8.0, 0.1, "8 for text, 5 for image input.")),
                advanced(
                    inputs.lag(0, 0, "Upstream's ar_step: 0 denoises a window's frames together, 5 chunk after chunk.")
                ),
                advanced(inputs.condition_noise(0.02, 0.0, "Noise level that frames taken over are shown at.")),
                io.Image.Input(
                    "start",
                    optional=True,
                    tooltip="A video or image to extend: its last frames are taken over. It is part of the result.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="All frames.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, negative, seed, frames, window, overlap, width, height,
        steps=50, guidance=6.0, shift=8.0, lag=0, condition_noise=0.02, start=None,
    ) -> io.NodeOutput:  # fmt: skip
        frames_of_video = Windows(frames, window, overlap, width, height)
        how = WindowSampling(steps, guidance, shift, lag, condition_noise)
        asked = Extension(positive, negative, seed, 0, (width, height), node_id=cls.hidden.unique_id)
        return io.NodeOutput(extend_in_windows(model, vae, asked, frames_of_video, how, start))
