"""Autoregressive Extend: a video, chunk after chunk, for as long as you like."""

from dataclasses import replace

from comfy_api.latest import io

from ..flowcache_core.checkpoints import MAGI_FAMILIES
from ..flowcache_core.errors import UserError
from ..flowcache_core.models.families import SOLVERS, family
from .comfyui import inputs
from .comfyui import magi as host_magi
from .comfyui import patch as host
from .comfyui.extend import Extended, Extension, Sampling, extend
from .comfyui.stream import workflow_metadata
from .comfyui.types import ReportType, ResumeType, StateType, StreamType
from .comfyui.widgets import advanced, found_by

AUTO = 0  # of a number: as recommended for the model's family


class AutoregressiveExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheAutoregressiveExtend",
            display_name="Autoregressive Extend",
            category="FlowCache",
            description="Generates a video chunk by chunk, or goes on from an earlier one: connect the state of "
            "another Autoregressive Extend to continue with a new prompt (nothing is computed again), or a latent to "
            "continue a given image or video.",
            **found_by("long video", "extend video", "autoregressive", "video continuation", "infinite video"),
            inputs=[
                io.Model.Input("model", tooltip="An autoregressive video model, best with a FlowCache node before it."),
                io.Conditioning.Input("positive", tooltip="What these chunks shall show."),
                io.Conditioning.Input("negative", tooltip="What they shall not show; used when guidance is not 1."),
                inputs.seed(
                    "Chunk i's noise depends on the seed and i alone, so a longer video begins like a shorter one."
                ),
                io.Int.Input(
                    "chunks",
                    default=8,
                    min=1,
                    max=10000,
                    tooltip="How many chunks to add. A chunk of 3 latent frames is 12 pixel frames.",
                ),
                inputs.steps(AUTO, 0, "Denoising steps of a chunk; 0: as recommended for the model."),
                inputs.guidance(
                    0.0, "Scale of classifier-free guidance; 1 turns it off, 0: as recommended for the model."
                ),
                io.Int.Input(
                    "frames_per_chunk",
                    default=AUTO,
                    min=0,
                    max=64,
                    tooltip="Latent frames of a chunk, as the model was trained; 0: as recommended for the model.",
                ),
                inputs.lag(
                    -1,
                    -1,
                    "Steps that a chunk is ahead of the next; the number of steps is one chunk after the "
                    "other, 0 all chunks together, -1: as recommended for the model.",
                ),
                inputs.pixels(
                    "width",
                    AUTO,
                    0,
                    "Pixels; 0: as recommended for the model. Not used when a latent or state is connected.",
                ),
                inputs.pixels(
                    "height",
                    AUTO,
                    0,
                    "Pixels; 0: as recommended for the model. Not used when a latent or state is connected.",
                ),
                advanced(
                    io.Combo.Input(
                        "solver",
                        options=["auto", *SOLVERS],
                        default="auto",
                        tooltip="How a step is taken; auto: as recommended for the model.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "attention",
                        options=["auto", "causal", "joint"],
                        default="auto",
                        tooltip="causal: chunk by chunk over the history, as FlowCache runs; joint: all chunks in "
                        "every forward, seeing each other both ways (SkyReels-V2 without acceleration). auto: as the "
                        "model was made for.",
                    )
                ),
                advanced(
                    inputs.shift(
                        0.0,
                        0.0,
                        "Moves the noise levels towards noise; 0: as recommended for the model. SkyReels-V2 "
                        "advises 8 for text and 5 for image input.",
                    )
                ),
                advanced(
                    inputs.condition_noise(
                        -1.0,
                        -1.0,
                        "Noise level that given frames are shown at (SkyReels-V2's addnoise_condition 20 is "
                        "0.02); -1: as recommended for the model.",
                    )
                ),
                io.Latent.Input(
                    "prefix",
                    optional=True,
                    tooltip="A given beginning: an encoded image or video. It is part of the result.",
                ),
                io.Latent.Input(
                    "end",
                    optional=True,
                    tooltip="A given end (an encoded image), which all chunks work towards. It is part of the result, "
                    "and nothing can go on from it.",
                ),
                StateType.Input(
                    "state",
                    optional=True,
                    tooltip="The state of another Autoregressive Extend with the same model: goes on from its last "
                    "chunk.",
                ),
                StreamType.Input(
                    "stream",
                    optional=True,
                    tooltip="Of Stream Video to Disk: finished chunks are decoded, shown and written to a video while "
                    "the run goes on.",
                ),
                ResumeType.Input(
                    "resume",
                    optional=True,
                    tooltip="Of Resume after Interrupt: finished chunks are kept on disk, and the same run goes on "
                    "from them.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="All frames, those before this extension included; only the last chunk's where a stream "
                    "keeps no latents.",
                ),
                StateType.Output(display_name="state", tooltip="Connect it to another Autoregressive Extend to go on."),
                ReportType.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, seed, chunks, steps, guidance, frames_per_chunk, lag, width, height,
        solver="auto", attention="auto", shift=0.0, condition_noise=-1.0, prefix=None, end=None, state=None,
        stream=None, resume=None,
    ) -> io.NodeOutput:  # fmt: skip
        if prefix is not None and state is not None:
            raise UserError(
                "Both a prefix and a state are connected; a state already holds what came before. Connect one."
            )
        asked = Extension(
            positive,
            negative,
            seed,
            chunks,
            (width, height),
            prefix=None if prefix is None else prefix["samples"],
            end=None if end is None else end["samples"],
            state=state,
            stream=stream,
            resume=resume,
            metadata=workflow_metadata(cls.hidden),
            node_id=cls.hidden.unique_id,
        )
        name = host.family_of(model)
        if name in MAGI_FAMILIES:
            host_magi.check_fixed(
                steps, end, frames_per_chunk=frames_per_chunk, lag=lag, solver=solver, attention=attention, shift=shift,
                condition_noise=condition_noise,
            )  # fmt: skip
            return _output(host_magi.extend(model, asked, steps, guidance))
        usual = family(name)
        steps = steps or usual.steps
        how = Sampling(
            levels=usual.shifted_levels(steps, shift) if shift else usual.levels(steps),
            chunk_frames=frames_per_chunk or usual.chunk_frames,
            lag=usual.lag if lag < 0 else lag,
            solver=usual.solver(steps) if solver == "auto" else solver,
            scale=guidance or usual.guidance,
            first_levels=usual.first_levels(steps),
            seeing=usual.attention if attention == "auto" else attention,
            condition=usual.condition if condition_noise < 0 else condition_noise,
        )
        size = (width or usual.size[0], height or usual.size[1])
        return _output(extend(model, replace(asked, size=size), how))


def _output(result: Extended) -> io.NodeOutput:
    shown = None if result.video is None else result.video.shown
    return io.NodeOutput({"samples": result.latent}, result.state, result.report, ui=shown)
