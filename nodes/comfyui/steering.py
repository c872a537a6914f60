"""What of the host's run is steered: the conditions that its guider was given, and how another one is made ready."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
from torch import Tensor

from ...flowcache_core.report import Report
from ...flowcache_core.schedule import ChunkSchedule
from .captions import BLEND, CHUNKS, SHOT, ChunkCaptions
from .patch import MEMORY


@dataclass(frozen=True)
class Steering:
    """One run of a sampler of ours.

    Attributes:
        guider: the host's.
        captions: of the run.
        noise, latent_image, seed: that conditions were made ready with.
        schedule, report: of the run.
    """

    guider: Any
    captions: ChunkCaptions
    noise: Tensor
    latent_image: Tensor | None
    seed: int
    schedule: ChunkSchedule
    report: Report

    def show(self, chunk: int, embedding: Tensor, more: dict) -> None:
        """Has a condition hold from a chunk on, made ready by the host as those that the run began with."""
        given = {name: value for name, value in self.captions.conditions["positive"][0].items() if name not in OWN}
        condition = given | more | {"cross_attn": embedding}
        model, device = self.guider.inner_model, self.noise.device
        (ready,) = comfy.samplers.encode_model_conds(
            model.extra_conds, [condition], self.noise, device, "positive", latent_image=self.latent_image,
            denoise_mask=None, seed=self.seed,
        )  # fmt: skip
        # Of the chunks that are over, the newest may still have its clean pass before it.
        self.captions.show(chunk, ready, oldest=chunk - self.schedule.max_active - 1)

    def bring_back(self) -> None:
        """Has the network on its device again, which the text encoder may have pushed out, and the room that the run
        has yet to take."""
        planned = self.guider.model_options.get("transformer_options", {}).get(MEMORY) or 0
        room = max(0, planned - self.report.history_bytes_allocated)
        comfy.model_management.load_models_gpu([self.guider.model_patcher], memory_required=room)


OWN = (CHUNKS, BLEND, SHOT)  # of a condition: what belongs to its chunks
