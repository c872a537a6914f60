"""Our engine as a sampler of the host."""

from dataclasses import dataclass, field
from functools import partial

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...flowcache_core.engine.anew import held
from ...flowcache_core.engine.build import IN_ORDER, RunSettings, Seeing, build_engine, given_chunks
from ...flowcache_core.engine.from_video import FromVideo
from ...flowcache_core.engine.loop import Engine, Progress, Sampling, beginning_with
from ...flowcache_core.engine.pictures import Scenes
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.families import FAMILIES, solver_of
from ...flowcache_core.models.longvie import leads
from ...flowcache_core.schedule import ChunkSchedule, Given, Shot
from ...flowcache_core.settings import OFF, Off, Settings
from ...flowcache_core.solvers.one_step import chunk_noise
from ...flowcache_core.storage.state import State
from . import gpus
from . import patch as host
from .captions import ChunkCaptions
from .checks import adapt_others, check_finite, cut_into_chunks, short_note
from .experts import check_experts
from .guider import FPS, RUN, GuiderGuidance, is_plain_sum, start_image, text_tokens
from .levels import check_flow, time_step_note
from .listener import RunListener
from .longvie import scenes_of
from .progress import say
from .steering import Steering

LEAD_NOISE = -1  # stands for a chunk's number where noise is drawn for given frames that fill none


@dataclass
class ARSampler(host.ChunkSampler):
    """Our engine as a host's sampler: through the guider that it is given, so that guidance is the host's.

    Attributes:
        chunk_frames: latent frames of a chunk.
        lag: ticks between the starts of two chunks; the number of steps, or more, is one chunk at a time.
        solver: a key of `SOLVERS`.
        seeing: "causal" goes chunk by chunk over a history; "joint" runs all chunks of a window together, "rolling" the
            active ones, seeing each other both ways (SkyReels-V2 and Rolling Forcing as upstream runs them); "pictures"
            makes each chunk from pictures of the one before (LongVie 2).
        first_levels: noise levels of the first chunk where it takes more steps than the others; for "causal".
        prefix: latent [B, C, T, H, W] in the host's space that comes before the generated frames.
        end: such a latent that comes after them; not for "rolling".
        condition: noise level that the prefix is shown at.
        state: an earlier run's state to go on from; for "causal" and "pictures".
        source: a video that chunks start from, where `chunks` says how many.
        beside: bytes of latents that the caller will hold in the end.
        chunks: how many to generate from a noise of a single chunk, each with its own noise of the run's seed; what is
            returned is then the last one. 0: as many as the noise holds behind the start image of ARVideoI2V if there
            is one, the last of which may be short; all frames are returned.
        listener: is told of the run.
    """

    chunk_frames: int
    lag: int
    solver: str
    seeing: Seeing = "causal"
    first_levels: list[float] | None = None
    prefix: Tensor | None = None
    end: Tensor | None = None
    condition: float = 0.0
    state: State | None = None
    source: FromVideo | None = None
    beside: int = 0
    chunks: int = 0
    listener: RunListener = field(default_factory=RunListener)

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        """Called by the host with a [B, C, T, H, W] noise; returns the sampled latent of that shape."""
        check_experts(guider.model_patcher)
        if denoise_mask is not None:
            raise UserError(
                "A noise mask was given; FlowCache extends videos instead: give the frames to keep as a prefix."
            )
        levels, sampling = sigmas.tolist(), guider.inner_model.model_sampling
        check_flow(sampling)
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        notes = [*adapt_others(options), *([] if self.chunks else time_step_note(sampling))]
        patch = host.patch_of(options)
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, host.KEY, host.diffusion_model, options, is_model_options=True)
        seed = extra_args.get("seed") or 0
        family, branches = host.family_of(guider.model_patcher), host.branches_of(guider)
        cut = self.cut(noise, options, family)
        self._check_end(levels, cut.chunks)
        frame_rate = options.get("transformer_options", {}).get(FPS, 24)
        with gpus.led(guider, options, family, branches, self.listener.settle, frame_rate) as led:
            call = SamplerCall(self, guider, options, levels, seed, noise, latent_image, callback, cut, led)
            return self._run(call, patch, notes)

    def _run(self, call: "SamplerCall", patch: host.Patch | None, notes: list[str]) -> Tensor:
        engine = call.engine(patch.settings if patch else OFF)
        engine.report.settings = patch.told(call.held(patch.settings)) if patch else "FlowCache off"
        short = short_note(call.cut.last_frames, self.chunk_frames)
        engine.report.notes += [*host.notes_of(call.options), *notes, *call.split_notes(engine), *short]
        engine.report.notes += [] if self.source is None else [self.source.note(call.levels)]
        if self.lag > (steps := call.schedule.whole_steps):
            engine.report.notes.append(f"lag is {self.lag}, above the {steps} steps: one chunk runs after the other")
        say(engine.report.notes)
        for chunk in engine.run():
            check_finite(chunk.latent, f"chunk {chunk.number}")
            latent = call.unscaled(chunk.latent)
            call.samples = [latent] if self.chunks else [*call.samples, latent]
            self.listener.chunk(chunk, engine)
        result = torch.cat(call.samples, dim=2)
        if patch and not self.chunks:
            patch.remember(call.model.process_latent_out(result.to(torch.float32)), engine.report)
        self.listener.done(engine, keeps_history=self.end is None)
        return result

    def _check_end(self, levels: list[float], chunks: int) -> None:
        """Raises UserError where a chunk would look at one that is not clean and never becomes so in this run."""
        if levels[-1] > 0 and chunks > 1 and self.lag > 0:
            raise UserError(
                f"The noise levels end at {levels[-1]:.3g}, so chunk 1 would look at a chunk 0 that is not clean; let "
                f"them end at 0, or split the steps of a single chunk (frames_per_chunk) or of chunks at lag 0."
            )

    def schedule(self, chunks: int, steps: int) -> ChunkSchedule:
        """Makes the schedule of a run of so many new chunks. Only a video's very first chunk takes more steps."""
        done = self.chunks_before()
        first = None if done or self.first_levels is None else len(self.first_levels) - 1
        skipped = 0 if self.source is None else self.source.skipped
        return ChunkSchedule(chunks, steps, min(self.lag, steps), done, first, skipped)

    def planned_bytes(self, guider, noise: Tensor, sigmas: Tensor, settings: Settings) -> int | None:
        """Works out what a run takes of the device's memory; None for a joint window, a forward like the host's."""
        if self.seeing in ("joint", "pictures"):
            return None
        cut = self.cut(noise, guider.model_options, host.family_of(guider.model_patcher))
        schedule = self.schedule(cut.chunks, len(sigmas) - 1)
        shape = (*noise.shape[:2], self.chunk_frames, *noise.shape[3:])
        return host.planned_bytes(guider, schedule, shape, settings, self.seeing, lead=cut.given_frames)

    def cut(self, noise: Tensor, model_options: dict, family: str) -> "Cut":
        """Says what a noise [B, C, T, H, W] becomes."""
        inside = self.begins_inside(family)
        if self.chunks:
            return Cut(self.chunks, inside=inside)
        given = start_image(model_options.get("transformer_options", {}), noise)
        before = 0 if given is None or inside else given.shape[2]
        return Cut(*cut_into_chunks(noise, self.chunk_frames, before), given, inside)

    def begins_inside(self, family: str) -> bool:
        """Whether given frames that fill no chunk are what the first new one begins with; else they stand before it."""
        return FAMILIES[family].image_inside and self.seeing == "causal"

    def chunks_before(self) -> int:
        """Counts the whole chunks that a causal run has behind it when it starts."""
        return self.frames_before() // self.chunk_frames if self.seeing in IN_ORDER else 0

    def frames_before(self) -> int:
        """Counts the frames that are there already."""
        if self.state is not None:
            return self.state.frames
        return 0 if self.prefix is None else self.prefix.shape[2]


@dataclass(frozen=True)
class Cut:
    """What a noise becomes.

    Attributes:
        chunks: that are generated.
        last_frames: of the last one where it is shorter than the others, else 0.
        given: the start image of ARVideoI2V, [B, C, T, H, W] in the host's space, or None.
        inside: frames that are given and fill no chunk are what the first one begins with.
    """

    chunks: int
    last_frames: int = 0
    given: Tensor | None = None
    inside: bool = False

    @property
    def given_frames(self) -> int:
        """Those of the start image that stand before the chunks."""
        return 0 if self.given is None or self.inside else self.given.shape[2]


class SamplerCall:
    """One call of an `ARSampler` by the host: its run, and what the host is shown of it.

    Args:
        sampler: that is called.
        guider, noise, latent_image, callback: the host's, see `ARSampler.sample`.
        options: the model options of this run.
        levels: noise levels, [steps + 1].
        seed: of the run.
        cut: of the noise.
        led: workers that follow the run, or None.
    """

    def __init__(
        self, sampler: ARSampler, guider, options: dict, levels: list[float], seed: int, noise: Tensor, latent_image,
        callback, cut: Cut, led: gpus.Led | None,
    ):  # fmt: skip
        self.sampler, self.guider, self.options, self.levels, self.seed = sampler, guider, options, levels, seed
        self.noise, self.latent_image, self.callback = noise, latent_image, callback
        self.model = guider.inner_model
        self.shape = (*noise.shape[:2], sampler.chunk_frames, *noise.shape[3:])
        self.cut, self.led = cut, led
        self.family = FAMILIES[host.family_of(guider.model_patcher)]
        self.schedule = sampler.schedule(cut.chunks, len(levels) - 1)
        self.captions = ChunkCaptions(guider.conds)
        self.begun = None if cut.inside else self._inside(cut.given)  # before the chunks, in the network's space
        self.samples = [] if self.begun is None else [self.begun]  # finished frames that are returned

    def held(self, settings: Settings) -> Settings:
        """What the run keeps of its history."""
        if self.sampler.seeing != "causal":
            return settings
        return held(self.family.anew, settings, self.sampler.chunk_frames, self.schedule.max_active)

    def engine(self, settings: Settings) -> Engine:
        """Makes the run; frames that are given have been run when it returns."""
        sampler, seeing, options = self.sampler, self.sampler.seeing, self.options["transformer_options"]
        prefix, end = self._inside(sampler.prefix) if self.begun is None else self.begun, self._inside(sampler.end)
        asked, begins = settings, None
        if self.cut.inside and sampler.state is None:
            prefix, begins = self._split(prefix if self.cut.given is None else self._inside(self.cut.given))
        self._check_seeing(prefix, end)
        if seeing not in IN_ORDER:
            settings = OFF
        one_sum = is_plain_sum(self.guider, self.options, host.KEY) and self.captions.alike
        guidance = GuiderGuidance(
            self.guider, self.model.diffusion_model, options, self.captions, self._ask,
            at_once=one_sum or seeing not in IN_ORDER, schedule=self.schedule,
            stores=seeing not in ("joint", "pictures"),
            plain=one_sum, led=self.led,
        )  # fmt: skip
        first_levels = sampler.first_levels if self.schedule.first_steps else None
        sampling = Sampling(
            self.levels, self._start, self._fresh, solver_of(guidance.backbone, sampler.solver), first_levels
        )
        self.sampling = beginning_with(sampling, self.schedule.prefix, begins)
        before = self.cut.given_frames or sampler.frames_before() % sampler.chunk_frames
        lead = before if seeing == "causal" and not self.cut.inside else 0
        state = sampler.state
        run = RunSettings(
            guidance.backbone, guidance, self.schedule, settings, self.sampling, seeing, self.shape,
            host.branches_of(self.guider), host.compute_dtype(self.model), self.noise.device,
            texts=self.captions.texts,
            text_tokens=text_tokens(self.guider),
            lead=lead,
            end=0 if end is None else end.shape[2],
            last_frames=self.cut.last_frames,
            attention=guidance.attention,
            beside=sampler.beside,
            loaded=state.by_branch if state else None,
            grain=None if prefix is None else partial(self._grain, prefix),
            scenes=self._scenes() if seeing == "pictures" else None,
            anew=self.family.anew,
            before=None if state is None else state.before(self.family.anew),
            shots=self.family.shots,
            new_shot=self.captions.begins_shot,
            shot=Shot() if state is None else state.shot,
            on_progress=lambda told: self._progress(told, engine),
            steer=lambda ahead: sampler.listener.steer(ahead, self._steering(engine)),
        )  # fmt: skip
        engine: Engine = build_engine(run) if self.led is None else self.led.engine(run)
        engine.report.notes += guidance.notes
        if seeing not in IN_ORDER and not (isinstance(asked.reuse, Off) and not asked.history.bounded):
            engine.report.notes.append(
                f"nothing is reused and no history is cut: attention '{seeing}' runs every step of a window; 'causal' "
                "reuses"
            )
        if not one_sum and seeing not in IN_ORDER and self.schedule.lag:
            engine.report.notes.append(
                "the guider is told one noise level for all chunks of a window, that of the newest: functions and "
                "prompts that change over the steps follow it"
            )
        if not one_sum and seeing == "causal":
            engine.report.notes.append(
                "chunks of a tick are asked for one by one (the guider or a prompt changes over the steps), so every "
                "layer holds active chunks too"
            )
        sampler.listener.plan(engine.report)
        options[RUN] = guidance
        if prefix is not None:
            for chunk, latent in given_chunks(
                prefix, lead, sampler.chunk_frames if seeing == "causal" else prefix.shape[2]
            ):
                engine.give(chunk, self._noised(chunk, latent), sampler.condition)
        if seeing == "pictures" and sampler.state is not None:  # the chunk that the next one begins with pictures of
            latest = sampler.state.latents[:, :, -sampler.chunk_frames :].to(self.noise)
            engine.give(self.schedule.prefix - 1, latest)
        if end is not None:
            engine.give(Given.END, end)
        return engine

    def _scenes(self) -> Scenes:
        """What chunks are shown, from what LongVie Control has put on the model."""
        height, width = (8 * side for side in self.shape[3:])
        return scenes_of(self.guider.model_patcher, self.options, (width, height), self.shape[2])

    def _steering(self, engine: Engine) -> Steering:
        return Steering(
            self.guider, self.captions, self.noise, self.latent_image, self.seed, self.schedule, engine.report
        )

    def _check_seeing(self, prefix: Tensor | None, end: Tensor | None) -> None:
        seeing = self.sampler.seeing
        if leads(self.model.diffusion_model) != (seeing == "pictures"):
            raise UserError(
                "LongVie 2 is run by Autoregressive Extend with attention auto, and nothing else is run so; use that."
            )
        if seeing == "pictures" and self.led is not None:
            raise UserError("FlowCache over GPUs does not divide LongVie 2; bypass that node.")
        if seeing == "pictures" and (prefix is not None or end is not None):
            raise UserError(
                "LongVie 2 begins with the picture that LongVie Control is given; leave prefix and end unconnected."
            )
        if seeing in IN_ORDER:
            return
        self.captions.refuse(f"attention '{self.sampler.seeing}'")
        if self.sampler.state is not None:
            raise UserError(
                f"A run with attention '{self.sampler.seeing}' keeps no history to go on from; connect a prefix "
                "instead."
            )
        if self.sampler.seeing == "rolling" and (prefix is not None or end is not None):
            raise UserError("Rolling Forcing takes no given frames; leave prefix and end unconnected.")

    def _inside(self, given: Tensor | None) -> Tensor | None:
        """Given frames in the network's latent space."""
        if given is None:
            return None
        return self.model.process_latent_in(given.to(self.noise)).expand(self.noise.shape[0], -1, -1, -1, -1)

    def _split(self, given: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Given frames that fill chunks, and those that the first new one begins with; None for no such ones."""
        if given is None:
            return None, None
        whole = given.shape[2] // self.sampler.chunk_frames * self.sampler.chunk_frames
        before, begins = given.tensor_split([whole], dim=2)
        return (before if before.shape[2] else None), (begins if begins.shape[2] else None)

    def _noised(self, chunk: int | Given, latent: Tensor) -> Tensor:
        """Given frames of a causal run, with as much noise as they are shown at; a window draws its own at every
        tick."""
        if not self.sampler.condition or self.sampler.seeing != "causal":
            return latent
        number = LEAD_NOISE if isinstance(chunk, Given) else chunk
        noise = chunk_noise(self.seed, number, self.shape).to(self.noise)
        return torch.lerp(latent, noise[:, :, : latent.shape[2]], self.sampler.condition)

    def _grain(self, prefix: Tensor, tick: int) -> Tensor:
        return chunk_noise(self.seed, LEAD_NOISE, prefix.shape, tick).to(prefix)

    def _ask(self, x: Tensor, sigma: float) -> Tensor:
        """The guider's clean estimate at one noise level."""
        level = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        return self.guider(x, level, model_options=self.options, seed=self.seed)

    def _start(self, chunk: int) -> Tensor:
        """A chunk at the first noise level."""
        if self.sampler.chunks:
            noise, source = chunk_noise(self.seed, chunk, self.shape).to(self.noise), self.sampler.source
            if source is None:
                return noise * self.levels[0]
            return source.start(chunk, noise, self.sampling.levels(chunk, self.schedule)[0])
        first = self.cut.given_frames + (chunk - self.schedule.prefix) * self.sampler.chunk_frames
        frames = slice(first, first + self.sampler.chunk_frames)
        noise = self.noise[:, :, frames]
        latent = torch.zeros_like(noise) if self.latent_image is None else self.latent_image[:, :, frames]
        return self.model.model_sampling.noise_scaling(self._level(0), noise, latent)

    def unscaled(self, latent: Tensor) -> Tensor:
        """A finished chunk as the host hands it on: where its last level is above 0, a next sampler gets it back by
        adding no noise."""
        return self.model.model_sampling.inverse_noise_scaling(self._level(-1), latent)

    def _level(self, step: int) -> Tensor:
        return torch.tensor(self.levels[step], device=self.noise.device)

    def split_notes(self, engine: Engine) -> list[str]:
        """Says for the report what is lost where the steps are split over two samplers."""
        notes = []
        if self.levels[-1] > 0:
            notes.append(
                f"the noise levels end at {self.levels[-1]:.3g}: the latent is for a next sampler with DisableNoise, "
                "and none of it is kept as history"
            )
        given = self.latent_image is not None and bool(self.latent_image.any())
        if not given or self.noise.any():
            return notes
        forgotten = [f"solver {self.sampler.solver}"] if self.sampler.solver != "euler" else []
        if engine.policy.recomputed(self.schedule.steps) != frozenset(range(self.schedule.steps)):
            forgotten.append("the forecast")
        if forgotten:
            notes.append(
                f"goes on at noise level {self.levels[0]:.3g} from another sampler: {' and '.join(forgotten)} "
                f"begin{'s' if len(forgotten) == 1 else ''} anew, without the steps before, which an unbroken run has"
            )
        return notes

    def _fresh(self, chunk: int, step: int) -> Tensor:
        batch, channels, frames, *size = self.shape
        if chunk == self.schedule.indices[-1]:
            frames = self.cut.last_frames or frames
        return chunk_noise(self.seed, chunk, (batch, channels, frames, *size), step).to(self.noise)

    def _progress(self, told: Progress, engine: Engine) -> None:
        self.sampler.listener.progress(told, engine)
        if self.callback:
            # SamplerCustomAdvanced takes its clean estimate of the whole video from the last call.
            before = self.samples if told.tick == told.ticks else []
            shown = torch.cat([*before, *(chunk.estimate() for chunk in engine.advanced)], dim=2)
            self.callback(told.tick - 1, shown, shown, told.ticks)
