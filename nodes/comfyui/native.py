"""FlowCache in a run of the host's own `ar_video` sampler: place and step are read off its calls."""

from functools import cached_property, partial

import torch
from torch import Tensor

from ...flowcache_core.engine.build import RunSettings, build_engine
from ...flowcache_core.engine.chunk import ActiveChunk
from ...flowcache_core.engine.forward import Step
from ...flowcache_core.engine.loop import Engine, Sampling
from ...flowcache_core.errors import UserError
from ...flowcache_core.schedule import ChunkSchedule, Given, Place
from ...flowcache_core.settings import Settings
from ...flowcache_core.solvers.one_step import Renoise
from .captions import ChunkCaptions
from .checks import cut_into_chunks, short_note
from .guider import GuiderGuidance, start_image, text_tokens


class NativeRun:
    """One run of the `ar_video` sampler, which takes the steps itself and adds fresh noise at each of them.

    Args:
        guider: the host's.
        settings: FlowCache's.
        sampler: the host's.
        sigmas: noise levels, [steps + 1].
        noise: of the whole video, [B, C, T, H, W].
        options: the transformer options of the run.
        dtype: that the network computes in.
        branches: of guidance.
    """

    def __init__(
        self, guider, settings: Settings, sampler, sigmas: Tensor, noise: Tensor, options: dict, dtype, branches
    ):
        initial = start_image(options, noise)
        self.chunk_frames = sampler.extra_options.get("num_frame_per_block", 1)
        self.lead = 0 if initial is None else initial.shape[2]
        chunks, self.last_frames = cut_into_chunks(noise, self.chunk_frames, self.lead)
        self.notes = short_note(self.last_frames, self.chunk_frames)
        steps = len(sigmas) - 1
        self.levels = sigmas.tolist()
        if self.levels[-1] > 0:
            raise UserError(
                f"The noise levels end at {self.levels[-1]:.3g}, and SamplerARVideo stores every chunk as clean; let "
                f"them end at 0, or split the steps with AR Sampler (FlowCache)."
            )
        self.schedule = ChunkSchedule(chunks, steps, steps)
        self.guider, self.settings, self.options = guider, settings, options
        self.shape = (*noise.shape[:2], self.chunk_frames, *noise.shape[3:])
        self.dtype, self.branches = dtype, branches
        self.device = noise.device
        self.calls = 0

    @cached_property
    def guidance(self) -> GuiderGuidance:
        """Made at the first call, when the guider has prepared its conditions."""
        network = self.guider.model_patcher.model.diffusion_model
        captions = ChunkCaptions(self.guider.conds)
        return GuiderGuidance(self.guider, network, self.options, captions, lambda x, sigma: x, False, self.schedule)

    @cached_property
    def engine(self) -> Engine:
        """What decides, and holds the history; made at the first call, which tells the device."""
        sampling = Sampling(self.levels, start=lambda chunk: torch.empty(0), solver=Renoise)
        guidance = self.guidance
        run = RunSettings(
            guidance.backbone, guidance, self.schedule, self.settings, sampling, "causal", self.shape, self.branches,
            self.dtype, self.device, lead=self.lead, last_frames=self.last_frames,
            attention=guidance.attention, text_tokens=text_tokens(self.guider),
        )  # fmt: skip
        return build_engine(run)

    def predict(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed) -> Tensor:
        """Answers one call of the sampler: a step of a chunk, or the pass that stores a clean one."""
        self.device = x.device
        self.guidance.ask = partial(self._ask, executor, timestep, model_options, seed)
        forward, steps = self.engine.forward, self.schedule.steps
        frame = model_options["transformer_options"]["ar_state"]["start_frame"]
        if frame < self.lead:
            forward.give(Given.LEAD, x.expand(self.shape[0], -1, -1, -1, -1), 0.0)
            return torch.zeros_like(x)
        first = (frame - self.lead) // self.chunk_frames
        step = self.calls % (steps + 1)
        self.calls += 1
        if step == steps:  # the host always makes a clean pass, whether its keys are wanted or not
            if x.shape[2] == self.chunk_frames:  # a short one is the last, which nobody looks at
                forward.give(first, x, 0.0)
            self._finish(first)
            return torch.zeros_like(x)
        # The host draws its noise like what it gets, in another order where that lies otherwise in memory.
        return self._step(first, step, x).contiguous()

    def _step(self, index: int, step: int, x: Tensor) -> Tensor:
        if step == 0:
            self.engine.active = [self.engine.begin(index)]
        chunk: ActiveChunk = self.engine.active[0]
        chunk.latent = x
        asked = Step(x, chunk.sigma, Place(index, step, self.schedule.start(index) + step))
        (again,) = self.engine.decide([asked])
        clean, recomputed = None, False
        if again or self.engine.forward.holds_residual:
            ((velocity, chunk.branches, recomputed),) = self.engine.forward.velocities(
                [asked._replace(recompute=again)]
            )
            clean = x - asked.sigma * velocity
        self.engine.report.record(index, chunk.branches, recomputed)
        return chunk.take(clean)

    def _finish(self, chunk: int) -> None:
        report = self.engine.report
        report.chunks_done += 1
        report.history.append(
            (self.schedule.start(chunk) + self.schedule.steps - 1, self.engine.forward.history_bytes[0])
        )

    def _ask(self, executor, timestep: Tensor, model_options: dict, seed, x: Tensor, sigma: float) -> Tensor:
        level = timestep if x.shape[0] == timestep.shape[0] else timestep[:1].expand(x.shape[0])
        return executor(x, level, model_options, seed)
