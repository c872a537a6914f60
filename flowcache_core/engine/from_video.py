"""Video to video: chunks that start from a given video under noise, instead of from noise alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..schedule import ChunkSchedule
from ..solvers.noise_levels import remaining

STRENGTH = 0.6  # where nothing else is asked for, as in krea-ai/realtime-video's generate.ipynb


@dataclass(frozen=True)
class FromVideo:
    """What chunks start from.

    A chunk begins at the noise level where the last `strength` of its schedule begins, as its own frames of the video
    with that much of its noise, and takes the steps that are left. Their levels are those of the whole schedule, but
    for the first: it lies between two of them where the strength is no whole number of steps. So a lower strength costs
    fewer steps, and one just above 0 gives the video back.

    The lag stays, as far as there are steps for it: neighbouring chunks are as far apart in noise as in a run from
    noise, and fewer are active at once. Steps that reuse is told by their numbers (`settings.Fixed`, a measured list)
    are counted in the whole schedule, so that each stays at its noise level; what was to be recomputed before the start
    is left out, and the first step always is recomputed. Forecast and solver begin there without any memory.

    Source: `strength` of krea-ai/realtime-video, release_server.py, and `denoise` of ComfyUI's KSampler, which begin at
    such a level too, but spread all steps over what is left of the way: ask for more steps to have as many.

    Attributes:
        latents: [B, C, T, H, W] in the network's space; frame i stands for frame i of the whole video, frames that are
            given before the chunks included.
        strength: above 0, below 1.
        lead: frames before chunk 0.
        chunk_frames: of a chunk.
        whole_steps: of a chunk that starts from noise.
    """

    latents: Tensor
    strength: float
    lead: int
    chunk_frames: int
    whole_steps: int

    @property
    def skipped(self) -> int:
        """Steps of the whole schedule that lie before a chunk's first one."""
        return self.whole_steps - self._left(self.whole_steps)

    def levels(self, whole: Sequence[float]) -> list[float]:
        """Gives the noise levels that are left of a chunk's, [steps left + 1]."""
        return remaining(whole, self.strength)

    def first_levels(self, whole: Sequence[float] | None) -> list[float] | None:
        """Gives those of a first chunk that takes more steps, if there is one."""
        return None if whole is None else self.levels(whole)

    def schedule(self, whole: ChunkSchedule) -> ChunkSchedule:
        """Gives the schedule of the steps that are left."""
        steps, first = self._left(whole.steps), whole.first_steps and self._left(whole.first_steps)
        return replace(whole, steps=steps, lag=min(whole.lag, steps), first_steps=first, skipped=self.skipped)

    def _left(self, steps: int) -> int:
        return len(self.levels([0.0] * (steps + 1))) - 1

    def start(self, chunk: int, noise: Tensor, level: float) -> Tensor:
        """Gives a chunk's latent at its first noise level, from its unit noise [B, C, chunk frames, H, W]."""
        first = self.lead + chunk * self.chunk_frames
        return torch.lerp(self.latents[:, :, first : first + self.chunk_frames].to(noise), noise, level)

    def note(self, levels: Sequence[float]) -> str:
        """Says for the report what is sampled.

        Args:
            levels: that are left.
        """
        steps = len(levels) - 1
        return (
            f"chunks start from a video: strength {self.strength:g} begins at noise level {levels[0]:.3g} and takes "
            f"{steps} step{'s' * (steps != 1)}"
        )


def from_video(
    latents: Tensor | None, strength: float, shape: Sequence[int], before: int, schedule: ChunkSchedule
) -> FromVideo | None:
    """What a run's chunks start from; None where that is noise alone: without a video, or at strength 1.

    Args:
        latents: as for `FromVideo`, or None.
        strength: above 0 to 1.
        shape: of a chunk, [B, C, chunk frames, H, W].
        before: frames that are given, or there, before the first new chunk.
        schedule: of the whole run.

    Raises:
        UserError: a strength out of range, or a video that does not fit or is too short.
    """
    if not 0.0 < strength <= 1.0:
        raise UserError(
            f"strength is {strength:g}, expected above 0 to 1: near 0 the video stays as it is, 1 makes a new one."
        )
    if latents is None:
        return None
    batch, channels, chunk_frames, *size = shape
    if latents.ndim != 5 or list(latents.shape[:2]) != [batch, channels] or list(latents.shape[3:]) != list(size):
        raise UserError(
            f"The video to start from has shape {list(latents.shape)}, expected "
            f"[{batch}, {channels}, frames, {', '.join(map(str, size))}]; bring it to that size, and encode it with "
            "this model's VAE."
        )
    frames, end = latents.shape[2], before + schedule.chunks * chunk_frames
    if frames < end:
        enough = max(0, frames - before) // chunk_frames
        behind = f" behind the {before} that are there" if before else ""
        raise UserError(
            f"The video to start from has {frames} latent frames, and {schedule.chunks} chunks of {chunk_frames}"
            f"{behind} take {end}: it is enough for {enough} chunk{'s' * (enough != 1)}; ask for no more, or give a "
            "longer one."
        )
    if not torch.isfinite(latents).all():
        raise UserError("The video to start from holds NaN or infinite values; check the VAE that encoded it.")
    lead = before - schedule.prefix * chunk_frames
    return None if strength == 1.0 else FromVideo(latents, strength, lead, chunk_frames, schedule.steps)
