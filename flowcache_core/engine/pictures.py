"""Chunk after chunk, each from pictures of the one before: how LongVie 2 goes on.

A chunk is denoised alone; frames see each other both ways. What it is shown of the chunk before was decoded to pixels
and encoded again, and its latents stand in front of its own. There is no history of keys and values.

Source: LongVie 2, inference.py and diffsynth/pipelines/wan_video_new_longvie.py.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..history.cache import Attention
from ..report import Report
from ..schedule import ChunkSchedule, Given
from .forward import Step, Velocity
from .guidance import Guidance, Texts
from .joint import WindowForward, WindowSite
from .layers import row_levels

FIRST_FRAME_NOISE = 0.925926  # level of a chunk's first frame at its start, where something came before
NO_HISTORY = "nothing is cut: chunks begin with pictures of the one before, and keep no history of keys and values"


class Scene(NamedTuple):
    """What a chunk is shown beside its text; latents are in the network's space, of one video for every row.

    Attributes:
        image: channels that stand behind the latent's, [1, C, T, H, W]: of the picture that the chunk begins with.
        features: what an image encoder says of that picture, [1, tokens, width].
        controls: videos that it follows, as many channels as latent and image have together.
        history: latents of what came before it, [1, C, frames, H, W], or None for a video's first chunk.
    """

    image: Tensor
    features: Tensor
    controls: tuple[Tensor, ...]
    history: Tensor | None


Scenes = Callable[[int, Tensor | None], Scene]  # a chunk and the finished one before it, if there is one


class PicturesForward(WindowForward):
    """The forwards of one run.

    Args:
        backbone, guidance, report, tables, attention, check: as for `WindowForward`; the backbone is also shown scenes,
            see `models.longvie.LongVieBackbone`.
        schedule: one chunk after the other.
        scenes: gives a chunk's scene.
        dtype: that is computed with.
    """

    def __init__(
        self,
        backbone,
        guidance: Guidance,
        report: Report,
        schedule: ChunkSchedule,
        scenes: Scenes | None,
        dtype: torch.dtype,
        **more,
    ):
        super().__init__(backbone, guidance, report, **more)
        if schedule.lag < schedule.steps:
            raise UserError(
                f"The lag is {schedule.lag} of {schedule.steps} steps, and a chunk begins with pictures of the "
                "finished one before; set the lag to the steps."
            )
        if scenes is None:
            raise UserError("Nothing says which pictures the chunks are made from; give scenes.")
        self.scenes, self.dtype = scenes, dtype
        report.stores = 0
        self.before: Tensor | None = None
        self.scene: Scene | None = None

    def start(self, noise: Callable[[int], Tensor], chunk: int) -> Tensor:
        """A chunk's latent at the first noise level: one noise for all chunks, with the end of the one before in its
        first frame.

        Args:
            noise: of a chunk.
        """
        self.scene = self.scenes(chunk, self.before)
        latent, history = noise(0), self.scene.history
        if history is None:
            return latent
        shown = torch.lerp(history[:, :, -1:].to(latent), latent[:, :, :1], FIRST_FRAME_NOISE)
        return torch.cat([shown, latent[:, :, 1:]], dim=2)

    def signals(self, steps: Sequence[Step]) -> list[Tensor]:
        """What a policy watches for change."""
        (step,) = steps
        x = step.x.to(self.dtype)
        self._show(self.sites.home, x)
        return [self.backbone.reuse_signal(x, row_levels(step.sigma, x))]

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Takes a finished chunk that came before."""
        if isinstance(chunk, Given):
            raise UserError("Given frames are whole chunks of an earlier run here; give an image as the start image.")
        self.before = latent

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs the one active chunk."""
        values, branches = self.guided(steps, self.network)
        return [Velocity(value, branches) for value in values]

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk, which the next one begins with pictures of."""
        self.before = latent

    def network(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        (step,) = steps
        site, x = self.sites.of(backbone, step.x.device), step.x
        runs, levels, before = site.backbone, row_levels(step.sigma, x), self._show(site, x)
        conditioning = runs.conditioning(x, levels, [[site.contexts.of(text) for text in texts(step.place.chunk)]])
        hidden, attend = runs.embed(x), self._among(site, before + x.shape[2])
        for layer in range(runs.layers):
            self.check()
            hidden = runs.block(layer, hidden, conditioning, attend)
        return [runs.head(x, levels, runs.residual(x, hidden))]

    def _show(self, site: WindowSite, x: Tensor) -> int:
        """Tells a site's network the scene; gives the frames that stand before a chunk's own."""
        assert self.scene is not None
        site.backbone.show(self.scene, x, self._among(site, x.shape[2]))
        return 0 if self.scene.history is None else self.scene.history.shape[2]

    def _among(self, site: WindowSite, frames: int) -> Attention:
        """Attention of so many frames among themselves."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            table = site.tables.of(0, frames)
            return self.attention(self.turn(q, table), self.turn(k, table), v)

        return attend
