"""The sizes of a checkpoint's network, read off its tensors, which are then held against them."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..models.longvie import LongVieConfig
from ..models.magi.config import MagiConfig
from ..models.magi.network import MagiNetwork
from ..models.magi.text import TOKEN_PREFIX
from ..models.wan import WanConfig
from .others import is_led
from .weight_files import FLOAT4

# Marks of repackers, tables that are worked out anew, and what trainers leave behind.
IDLE = re.compile(r"^model_type\.|(^|\.)(freqs\w*|inv_freq|\w*step|num_updates|n_averaged|epoch)$")
# Scales that fp8 files carry beside a weight, as ComfyUI writes them.
QUANTIZATION = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$")


def wan_config(path: Path, tensors: dict[str, Tensor], settings: dict) -> WanConfig:
    """Reads the sizes of a network of the Wan 2.1 layout off its tensors.

    Args:
        path: named in errors.
        tensors: under Wan 2.1's names.
        settings: may hold the number of heads and the norms' epsilon, which no tensor tells; without them a head is 128
            wide, and the epsilon Wan's.

    Raises:
        UserError: a tensor is missing, or of a shape that no such network has.
    """

    def shape(name: str, dimensions: int = 2) -> torch.Size:
        if name not in tensors:
            raise UserError(
                f"{path.name} lacks {name}, which every network of the Wan 2.1 layout has; it is cut down, or one "
                "shard of several: give the folder or the index.json."
            )
        found = tensors[name].shape
        if len(found) != dimensions or 0 in found:
            raise UserError(
                f"{path.name} has {name} of shape {list(found)}, expected {dimensions} sizes above 0; it is damaged or "
                "packed in a way that is not known here: use another file."
            )
        return found

    dim, in_dim, *patch_size = shape("patch_embedding.weight", 5)
    out_dim = shape("head.head.weight")[0] // math.prod(patch_size)
    led = is_led(tensors)
    if in_dim != out_dim and not led:
        raise UserError(
            f"{path.name} takes {in_dim} channels and gives {out_dim}, as Wan image-to-video and control do; expected "
            "a text-to-video network, to which images are given as a prefix."
        )
    num_layers = len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)})
    num_heads = settings.get("num_heads", settings.get("num_attention_heads", dim // 128))
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads or dim // num_heads % 2:
        raise UserError(
            f"{path.name} has width {dim} and {num_heads} heads, which does not divide into even heads; put the right "
            'number into its metadata: config = {"transformer": {"num_heads": …}}.'
        )
    eps = settings.get("eps", WanConfig.eps)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"{path.name} is said to have an eps of {eps!r}, expected a small number such as 1e-06.")
    config = WanConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=in_dim,
        out_dim=out_dim,
        text_dim=shape("text_embedding.0.weight")[1],
        freq_dim=shape("time_embedding.0.weight")[1],
        patch_size=cast(tuple[int, int, int], tuple(patch_size)),
        eps=eps,
        fps="fps_embedding.weight" in tensors,
        cross_attn_norm=any(name.startswith("blocks.") and ".norm3." in name for name in tensors),
    )
    if not led:
        return config
    beside = {name.split(".")[1] for name in tensors if name.startswith("control_blocks_dense.")}
    image_dim = shape("img_emb.proj.1.weight")[1]
    return LongVieConfig(**vars(config), control_layers=len(beside), image_dim=image_dim)


def _shapes(config: WanConfig | MagiConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = MagiNetwork(config) if isinstance(config, MagiConfig) else config.network()
    return {name: weight.shape for name, weight in network.state_dict().items()}


def _check_count(path: Path, tensors: dict[str, Tensor], config: WanConfig | MagiConfig) -> None:
    """Raises UserError where there are too few tensors for the blocks that their names promise: to make a network of
    that many may take minutes."""
    one = replace(config, layers=1) if isinstance(config, MagiConfig) else replace(config, num_layers=1)
    layers = config.layers if isinstance(config, MagiConfig) else config.num_layers
    block = sum(bool(re.search(r"blocks\.(layers\.)?0\.", name)) for name in _shapes(one))
    least = layers * block // 2  # fused ones are fewer, and told as what they are
    if len(tensors) < least:
        raise UserError(
            f"{path.name} has {len(tensors)} tensors for {layers} blocks, expected at least {least}; it is cut down, "
            "or one shard of several: give the folder or the index.json."
        )


def own_tensors(
    path: Path, tensors: dict[str, Tensor], config: WanConfig | MagiConfig
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Picks what a network of these sizes has, with scales of fp8 weights and special tokens that stand beside it.

    Returns:
        Those tensors, and a line on the others, if there are any.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    magi = isinstance(config, MagiConfig)
    _check_count(path, tensors, config)
    expected = _shapes(config)
    lost = [name for name in expected if name not in tensors]
    layer = lost[0].rpartition(".")[0].rpartition(".")[0] if lost else ""
    instead = [name for name in tensors if name not in expected and layer and name.startswith(f"{layer}.")]
    if instead:
        raise UserError(
            f"{path.name} lacks {lost[0]} and has {instead[0]} there; its layers are fused, cut or packed in a way "
            "that is not known here: use another file."
        )
    if lost:
        raise UserError(
            f"{path.name} lacks {lost[0]} and {len(lost) - 1} more of {len(expected)} tensors; it is cut down, or one "
            "shard of several: give the folder or the index.json."
        )
    own, others = {}, []
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name] and tensor.dtype in (torch.uint8, FLOAT4):
            raise UserError(
                f"{path.name} has {name} packed in 4 bits or fewer, expected a weight a number; load it with ComfyUI's "
                "own Load Diffusion Model, and name its family on the FlowCache node."
            )
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{path.name} has {name} of shape {list(tensor.shape)}, expected {list(expected[name])} from its other "
                "weights; it is damaged or packed in a way that is not known here: use another file."
            )
        if name in expected or (name.startswith(TOKEN_PREFIX) if magi else QUANTIZATION.search(name)):
            own[name] = tensor
        else:
            others.append(name)
    return own, tuple([_left_out(path, others, "MAGI-1" if magi else "Wan 2.1")] if others else [])


def _left_out(path: Path, others: list[str], layout: str) -> str:
    others = sorted(others)
    unknown = [name for name in others if not IDLE.search(name)]
    first, more = ", ".join((unknown or others)[:3]), len(unknown or others) - 3
    names = first + (f" and {more} more" if more > 0 else "")
    if unknown:
        return one_line(
            f"Left out of {path.name}, as beyond the {layout} layout: {names}; if its videos look wrong, it is another "
            "kind of model."
        )
    return one_line(f"Left out of {path.name}, as computing nothing: {names}.")
