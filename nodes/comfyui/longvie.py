"""LongVie 2 in the host: its pictures through the host's VAE and image encoder, between two chunks of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from torch import Tensor

from ...flowcache_core.engine.pictures import Scenes
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.longvie import Clips

LED = "flowcache_led"  # key of a `Control` in transformer_options


@dataclass(frozen=True)
class Control:
    """What LongVie Control hangs on a model.

    Attributes:
        vae, image_encoder: the host's.
        start: the picture that the video begins with, [1, H, W, 3].
        dense, sparse: control videos, [frames, H, W, 3].
    """

    vae: Any
    image_encoder: Any
    start: Tensor
    dense: Tensor
    sparse: Tensor

    def determining(self) -> list:
        """What tells one run from another: the pictures, and a few numbers of each weight of what reads them."""
        read = [*_some_weights(self.vae.first_stage_model), *_some_weights(getattr(self.image_encoder, "model", None))]
        return [self.start, self.dense, self.sparse, read]


def led(model: comfy.model_patcher.ModelPatcher, control: Control) -> comfy.model_patcher.ModelPatcher:
    """A clone of a model that is led by videos."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[LED] = control
    return clone


def scenes_of(patcher, model_options: dict, size: tuple[int, int], chunk_frames: int) -> Scenes:
    """Gives what a run's chunks are shown; pictures are brought to its size as upstream does, whatever their shape.

    Args:
        patcher: of the model that is sampling; it is brought back to its device after other models were at work.
        size: width and height of the video in pixels.
        chunk_frames: latent frames of a chunk.

    Raises:
        UserError: nothing leads the model.
    """
    control: Control | None = model_options["transformer_options"].get(LED)
    if control is None:
        raise UserError("LongVie 2 is led by videos; connect LongVie Control (FlowCache) between model and Extend.")
    model, vae = patcher.model, control.vae

    def sized(pictures: Tensor) -> Tensor:
        planes = pictures[..., :3].movedim(-1, 1)
        return comfy.utils.common_upscale(planes, *size, "bicubic", "disabled").clamp(0, 1).movedim(1, -1)

    def encode(pictures: Tensor) -> Tensor:
        return model.process_latent_in(vae.encode(sized(pictures)).float())

    def decode(latent: Tensor) -> Tensor:
        images = vae.decode(model.process_latent_out(latent.float()))
        return images.flatten(0, -4)

    def features(picture: Tensor) -> Tensor:
        return control.image_encoder.encode_image(sized(picture[None]), crop=False).penultimate_hidden_states

    clips = Clips(encode, decode, features, control.start[0], (control.dense, control.sparse), chunk_frames)

    def scenes(chunk: int, before: Tensor | None):
        try:
            return clips(chunk, before)
        finally:
            comfy.model_management.load_models_gpu([patcher])

    return scenes


def _some_weights(module) -> Iterator[tuple]:
    for name, weight in module.named_parameters() if module is not None else ():
        yield name, tuple(weight.shape), weight.detach().flatten()[:: max(1, weight.numel() // 8)][:8]
