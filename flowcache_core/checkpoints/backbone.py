"""From a checkpoint's file to a backbone that runs, in one call: for Python users. Nodes load through ComfyUI.

loaded = load_backbone("self_forcing_dmd.pt", "causal", dtype=torch.bfloat16, device="cuda")
text = embedding.to(loaded.device, loaded.dtype)  # of the model's text encoder
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, first_line
from ..models import families
from ..models.experts import BOUNDARY, ExpertsBackbone
from ..models.families import Family
from ..models.fit import fit
from ..models.magi.config import magi_usual
from ..models.magi.network import MagiBackbone, load_network
from ..models.magi.text import SpecialTokens
from ..models.wan import WanBackbone, WanConfig, WanNetwork
from ..storage.files import parse_json
from .magi_files import TOKENS_FILE, find_tokens
from .reading import CheckpointInfo, load
from .sizes import QUANTIZATION

WAN_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGI_TYPES = (torch.float32, torch.bfloat16)  # as the nodes run it
SECOND = "transformer_2"  # the folder of a pipeline's second network
PIPELINE = "model_index.json"  # what a pipeline's folder says of itself
MAGI_BLOCKS = "videodit_blocks.layers."


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that is ready to run.

    Attributes:
        backbone: runs chunks through the network.
        info: what the checkpoint is; its `warnings` are meant for the user.
        usual: what the family is run with where the user does not say otherwise.
        dtype: that the network is computed in. Texts and latents must have it.
        device: that the network is on. Texts and latents must be there.
        special_tokens: MAGI-1's, for `models.magi.text.caption_text`; None if there are none.
    """

    backbone: WanBackbone | MagiBackbone | ExpertsBackbone
    info: CheckpointInfo
    usual: Family
    dtype: torch.dtype
    device: torch.device
    special_tokens: SpecialTokens | None = None

    @property
    def family(self) -> str:
        """Its name, a key of `models.families.FAMILIES`."""
        return self.info.family


def load_backbone(
    path: str | Path,
    family: str = "auto",
    *,
    fps: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = False,
) -> Loaded:
    """Loads a network of the Wan 2.1 or MAGI-1 layout and makes what runs it.

    Weights stay mapped from disk where they have the asked type and the CPU is the device; of the rest, memory holds
    one copy.

    Args:
        path: a safetensors or torch file, an index of shards, or a folder with one of them.
        family: "auto", or a key of `checkpoints.FAMILIES` to overrule what the file says.
        fps: frames a second that the video is made for, which SkyReels-V2 is told; None takes the family's.
        dtype: of weights and computation, float32, bfloat16 or (not for MAGI-1) float16; None takes that of the file's
            matrices, or bfloat16 if nothing can be computed in that. What MAGI-1 keeps in float32 or fp8 stays so.
        device: where the network runs; None is the CPU.
        check_finite: also reads every weight and refuses NaN and infinity.

    Raises:
        UserError: as for `load`; weights that are packed in a way that cannot be run here; or a type, a device or a
            number of frames that does not go.
    """
    if fps is not None and fps < 1:
        raise UserError(f"fps is {fps}, expected at least 1 frame a second.")
    place = _usable(device)
    info, tensors = load(path, family, check_finite=check_finite)
    usual = families.family(info.family)
    usual = replace(usual, fps=usual.fps if fps is None else fps)
    precision = _precision(path, info, dtype)
    config = info.config
    if isinstance(config, WanConfig):
        network = _wan_network(path, config, tensors, precision, place)
        return Loaded(usual.backbone(network, usual.fps, F.scaled_dot_product_attention), info, usual, precision, place)
    steps, size = magi_usual(config)
    tokens = find_tokens(path, tensors)
    if tokens is None:
        warning = (
            f"{Path(path).name} has no special tokens, so captions go without quality and duration: put MAGI-1's "
            f"example/assets/{TOKENS_FILE} beside it."
        )
        info = replace(info, warnings=(*info.warnings, warning))
    moved = {name: _magi_weight(name, tensor, dtype).to(place) for name, tensor in tensors.items()}
    backbone = MagiBackbone(load_network(moved, config.distilled, precision))
    usual = replace(usual, steps=steps, lag=steps // 4, size=size)
    return Loaded(backbone, info, usual, precision, place, tokens)


def load_experts(
    high: str | Path,
    low: str | Path | None = None,
    *,
    boundary: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = False,
) -> Loaded:
    """Loads the two networks of the family "experts" and makes what runs them.

    Args:
        high: the network for high noise levels, as for `load_backbone`; or the folder of a pipeline with both.
        low: the network for the others; None takes the second one of that folder.
        boundary: the lowest noise level of the first; None takes what the pipeline's folder says, else the family's.
        dtype, device, check_finite: as for `load_backbone`.

    Raises:
        UserError: as for `load_backbone`; or a second network is missing, or of other sizes or another type.
    """
    paths = [Path(high), Path(low)] if low is not None else [Path(high) / "transformer", Path(high) / SECOND]
    if low is None and not paths[1].exists():
        raise UserError(
            f"{Path(high).name} is one of two networks: give the other one too, or the folder that has both, as "
            f"transformer and {SECOND}."
        )
    first, second = (
        load_backbone(path, "experts", dtype=dtype, device=device, check_finite=check_finite) for path in paths
    )
    one, other = first.backbone, second.backbone
    if not (
        isinstance(one, WanBackbone) and isinstance(other, WanBackbone) and first.info.config == second.info.config
    ):
        raise UserError(
            f"{paths[0].name} and {paths[1].name} are networks of other sizes ({first.info.config}, "
            f"{second.info.config}), expected two of the same: give the two that belong together."
        )
    if first.dtype != second.dtype:
        raise UserError(
            f"{paths[0].name} is in {first.dtype}, {paths[1].name} in {second.dtype}: choose one type for both."
        )
    level = boundary if boundary is not None else _told_boundary(paths)
    usual = first.usual if level is None else replace(first.usual, boundary=level)
    warnings = dict.fromkeys((*first.info.warnings, *second.info.warnings))
    info = replace(first.info, bytes=first.info.bytes + second.info.bytes, warnings=tuple(warnings))
    backbone = ExpertsBackbone(one, other, usual.boundary or BOUNDARY)
    return replace(first, backbone=backbone, info=info, usual=usual)


def _told_boundary(paths: Sequence[Path]) -> float | None:
    """What the folder of a pipeline, which the networks lie in, says of where they change."""
    for path in paths:
        for folder in (path, path.parent, path.parent.parent):
            if (file := folder / PIPELINE).is_file():
                try:
                    told = parse_json(file.read_text(encoding="utf-8")).get("boundary_ratio")
                except (OSError, ValueError, AttributeError) as error:
                    raise UserError(f"Cannot read {file} ({first_line(error)}); download it again.") from error
                return float(told) if isinstance(told, (int, float)) and 0 < told < 1 else None
    return None


def _usable(device: torch.device | str | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"The device {str(device)!r} cannot be used ({first_line(error)}); choose cpu or one that is there."
        ) from error
    return place


def _precision(path: str | Path, info: CheckpointInfo, asked: torch.dtype | None) -> torch.dtype:
    """What the network is computed in."""
    if not info.dtype.is_floating_point:
        raise UserError(f"{Path(path).name} holds matrices of {info.dtype}, expected floats; give another file.")
    possible = WAN_TYPES if isinstance(info.config, WanConfig) else MAGI_TYPES
    if asked is None:
        return info.dtype if info.dtype in possible else torch.bfloat16
    if asked not in possible:
        names = ", ".join(str(one).removeprefix("torch.") for one in possible)
        raise UserError(f"The type {asked} was asked for, expected one of {names} for the family {info.family!r}.")
    return asked


def _wan_network(
    path: str | Path, config: WanConfig, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> WanNetwork:
    scales = [name for name in tensors if QUANTIZATION.search(name)]
    if scales:
        raise UserError(
            f"{Path(path).name} holds scaled fp8 weights ({scales[0]}), which only ComfyUI multiplies out; expected "
            "float32, bfloat16, float16 or plain fp8: use such a file, or the node Load AR Video Model."
        )
    with torch.device("meta"):
        network = config.network()
    moved = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return fit(network, moved, "network of the Wan 2.1 layout")


def _magi_weight(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A block's matrix in another type; vectors, embedders, the head and what is fp8 stay."""
    if dtype is None or not name.startswith(MAGI_BLOCKS) or tensor.ndim != 2 or tensor.itemsize == 1:
        return tensor
    return tensor.to(dtype)
