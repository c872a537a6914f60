"""Extend in Windows: a long video as SkyReels-V2's upstream makes it."""

import torch
from comfy_api.latest import io

from ..flowcache_core.engine.windows import window_sizes
from ..flowcache_core.errors import UserError
from ..flowcache_core.models.families import family
from ..flowcache_core.models.memory import FRAME_STRIDE
from .comfyui import inputs
from .comfyui import patch as host
from .comfyui.extend import Extension, Sampling, extend
from .comfyui.widgets import advanced, found_by


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
        usual = family(host.family_of(model))
        if start is not None and (start.shape[1], start.shape[2]) != (height, width):
            raise UserError(
                f"The start is {start.shape[2]}x{start.shape[1]}, the video {width}x{height}; scale the start."
            )
        video = start
        for number, size in enumerate(window_sizes(*(latent_frames(count) for count in (frames, window, overlap)))):
            taken = 0 if video is None else latent_frames(min(overlap, video.shape[0]))
            given = FRAME_STRIDE * taken - (FRAME_STRIDE - 1) if taken else 0
            prefix = vae.encode(video[-given:, :, :, :3]) if given else None
            new = size - taken
            each = usual.chunk_frames if lag else new
            if new < 1 or new % each:
                raise UserError(
                    f"Window {number + 1} has {new} new frames, which do not fill chunks of {each}; change the length."
                )
            made = extend(
                model,
                Extension(
                    positive, negative, (seed + number) % 2**64, new // each, (width, height), prefix,
                    node_id=cls.hidden.unique_id,
                ),
                Sampling(
                    usual.shifted_levels(steps, shift), each, lag, usual.solver(steps), guidance,
                    kind="joint", condition=condition_noise if given else 0.0,
                ),
            )  # fmt: skip
            images = vae.decode(made.latent).flatten(0, -4)[given:]
            video = images if video is None else torch.cat([video, images.to(video)])
        return io.NodeOutput(video)


def latent_frames(frames: int) -> int:
    return (frames - 1) // FRAME_STRIDE + 1
