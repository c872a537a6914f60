"""What a checkpoint is, and its weights under one set of names."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..models.magi.config import MagiConfig
from ..models.wan import WanConfig
from .family import FAMILIES, family_of, transformer_settings
from .layouts import layout_of, renamed
from .others import refuse_others
from .sizes import QUANTIZATION, own_tensors, wan_config
from .weight_files import FLOAT4, open_weights


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        family: a key of `FAMILIES`.
        config: sizes of the network.
        dtype: of the blocks' matrices.
        layout: whose names the file uses: "wan", "diffusers" or "magi".
        prefix: what stood before every name.
        metadata: the file's own.
        bytes: size on disk.
        warnings: one line each, for the user; if the family is a guess, the first says so.
        guessed: the file leaves its family open.
    """

    family: str
    config: WanConfig | MagiConfig
    dtype: torch.dtype
    layout: str
    prefix: str
    metadata: dict[str, str]
    bytes: int
    warnings: tuple[str, ...] = ()
    guessed: bool = False


def inspect(path: str | Path, family: str = "auto") -> CheckpointInfo:
    """Tells what a file, a folder or an index of shards is, without reading the weights.

    Args:
        family: "auto", or a key of `FAMILIES` to overrule what the file says.

    Raises:
        UserError: not weights, another architecture, parts missing, or a family that the file cannot be.
    """
    return load(path, family, mapped=False)[0]


def load(
    path: str | Path, family: str = "auto", check_finite: bool = False, use_ema: bool = True, mapped: bool = True
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Opens a checkpoint: what it is, and its weights, mapped from disk, under Wan 2.1's (or MAGI-1's) names.

    Args:
        family: as for `inspect`.
        check_finite: also read every weight and refuse NaN and infinity.
        use_ema: of a torch file that has both, take "generator_ema" rather than "generator".
        mapped: False gives tensors of the meta device, whose weights nobody can read.

    Raises:
        UserError: as for `inspect`; or a weight that is NaN or infinite, by name.
    """
    path = Path(path)
    if family != "auto" and family not in FAMILIES:
        raise UserError(f"The family {family!r} is unknown; choose auto or one of {', '.join(FAMILIES)}.")
    file = open_weights(path, use_ema, mapped)
    prefix, layout = layout_of(path, file.tensors)
    tensors = with_parts(renamed(file.tensors, prefix, layout), file.parts)
    refuse_others(path, tensors)
    settings, unheeded = transformer_settings(path, file, tensors)
    wan = None if layout == "magi" else wan_config(path, tensors, settings)
    chosen = family != "auto"
    family, open_question = family_of(path, file, wan, settings, family)
    config = wan or MagiConfig.from_tensors(tensors, distilled=family == "magi distilled")
    tensors, left_out = own_tensors(path, tensors, config)
    first = "videodit_blocks.layers.0.self_attention.linear_qkv" if layout == "magi" else "blocks.0.self_attn"
    dtype = tensors[f"{first}.q.weight"].dtype
    if check_finite:
        _check_finite(path, tensors)
    warnings, guessed = (*open_question, *file.notes, *unheeded, *left_out), bool(open_question) and not chosen
    return CheckpointInfo(family, config, dtype, layout, prefix, file.metadata, file.bytes, warnings, guessed), tensors


def with_parts(tensors: dict[str, Tensor], parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts LongVie's files over the network that they are for. What they replace was scaled by numbers of its own."""
    layers = {name.rpartition(".")[0] for name in parts}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (QUANTIZATION.search(name) and name.rpartition(".")[0] in layers)
    }
    return kept | parts


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        floats = tensor.is_floating_point() and tensor.dtype != FLOAT4  # which has neither
        pieces = tensor.flatten().split(1 << 20) if floats else ()
        if not all(piece.float().isfinite().all() for piece in pieces):
            raise UserError(f"{path.name} holds NaN or infinity in {name}, expected finite weights; download it again.")
