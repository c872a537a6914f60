"""A LoRA that becomes part of the network it was trained on: W + alpha / rank * up @ down, layer by layer.

Source: LoRA (arXiv 2106.09685); names as peft saves them (LongLive's lora.pt, utils/lora_utils.py), or ComfyUI's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from .weight_files import open_weights

PREFIXES = re.compile(r"^(base_model\.model\.|diffusion_model\.|transformer\.|model\.)+")
WRAPPED = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
PART = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))")
KINDS = {"A": "down", "B": "up"}


class Factors(NamedTuple):
    """What is added to one matrix.

    Attributes:
        down, up: [rank, width in], [width out, rank].
        scale: of their product.
    """

    down: Tensor
    up: Tensor
    scale: float

    def added(self, weight: Tensor) -> Tensor:
        """The matrix with it, of its own type; computed in float32."""
        return weight.float().addmm(self.up.float(), self.down.float(), alpha=self.scale).to(weight.dtype)


class Lora:
    """The factors of a file, by the names of the weights that they go to.

    Args:
        path: of a safetensors or torch file.
        weights: of the network, under Wan 2.1's names.

    Raises:
        UserError: no LoRA, or one of another network.
    """

    def __init__(self, path: str | Path, weights: Mapping[str, Tensor]):
        path = Path(path)
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in open_weights(path).tensors.items():
            part = PART.fullmatch(PREFIXES.sub("", WRAPPED.sub("", name)))
            if part is None:
                raise UserError(f"{path.name} has the tensor {name!r}, expected lora_A and lora_B; give a LoRA.")
            layer, kind, alpha = part.groups()
            found.setdefault(f"{layer}.weight", {})[alpha or KINDS.get(kind, kind)] = tensor
        self.factors = {name: _factors(path, name, parts, weights.get(name)) for name, parts in found.items()}

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the network with what the LoRA adds to it."""
        return self.factors[name].added(weight) if name in self.factors else weight


def _factors(path: Path, name: str, parts: Mapping[str, Tensor], weight: Tensor | None) -> Factors:
    if weight is None:
        raise UserError(f"{path.name} changes {name!r}, which the network does not have; give another LoRA.")
    if not {"down", "up"} <= set(parts):
        raise UserError(f"{path.name} has only {', '.join(parts)} of {name!r}, expected both factors; load it anew.")
    down, up = parts["down"], parts["up"]
    shapes = [list(one.shape) for one in (up, down, weight)]
    if down.ndim != 2 or up.ndim != 2 or [up.shape[0], down.shape[1]] != shapes[2] or up.shape[1] != down.shape[0]:
        raise UserError(
            f"{path.name} has {shapes[0]} and {shapes[1]} for {name!r}, which is {shapes[2]}; give another LoRA."
        )
    if not all(one.float().isfinite().all() for one in (down, up)):
        raise UserError(f"{path.name} holds NaN or infinity for {name!r}, expected finite weights; download it again.")
    alpha = float(parts["alpha"]) if "alpha" in parts else down.shape[0]
    return Factors(down, up, alpha / down.shape[0])
