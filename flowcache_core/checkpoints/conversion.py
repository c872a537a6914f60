"""One stamped file that ComfyUI's stock loader reads, out of a checkpoint of any layout."""

import json
from pathlib import Path

import torch

from ..errors import UserError
from ..models.magi.text import SpecialTokens
from ..models.wan import WanConfig
from ..storage.files import parse_json
from .family import CAUSAL_FAMILIES, MAGI_FAMILIES, STAMP
from .lora import Lora
from .reading import CheckpointInfo, inspect, load
from .sizes import QUANTIZATION
from .weight_files import Progress, write_safetensors


def untold(config: WanConfig) -> dict:
    """Gives what ComfyUI does not read off the tensors and has other defaults for, under its names."""
    usual = {"num_heads": config.dim // 128, "text_dim": 4096, "eps": 1e-6, "cross_attn_norm": True}
    return {name: getattr(config, name) for name, value in usual.items() if getattr(config, name) != value}


def stamp(info: CheckpointInfo) -> dict[str, str]:
    """Makes the metadata of a file of this family: our stamp, and what ComfyUI's stock loader wants to know."""
    try:
        host = parse_json(info.metadata.get("config", "{}"))
    except ValueError:
        host = {}
    transformer = dict(host.get("transformer", {}))
    transformer.pop("causal_ar", None)
    if info.family in CAUSAL_FAMILIES:
        transformer["causal_ar"] = True
    if isinstance(info.config, WanConfig):
        transformer |= untold(info.config)
    metadata = {key: value for key, value in info.metadata.items() if key != "config"}
    if transformer or len(host) > 1:
        metadata["config"] = json.dumps(host | {"transformer": transformer})
    return metadata | {"format": "pt", STAMP: json.dumps({"family": info.family})}


def convert(
    path: str | Path,
    out: str | Path,
    family: str = "auto",
    dtype: torch.dtype | None = None,
    use_ema: bool = True,
    progress: Progress | None = None,
    special_tokens: str | Path | None = None,
    lora: str | Path | None = None,
) -> CheckpointInfo:
    """Writes a checkpoint of any layout as one stamped safetensors file that ComfyUI's stock loader reads, or our own
    loader, if it is MAGI-1.

    Nothing half-written is left behind, and memory stays at one tensor.

    Args:
        family: as for `inspect`; must be told where the file cannot tell.
        dtype: of the matrices in the new file; None leaves all weights as they are.
        progress: called with bytes written and bytes in all.
        special_tokens: MAGI-1's special_tokens.npz, to be put into the file.
        lora: a LoRA of a network of the Wan layout, to be merged into it.

    Returns:
        What the new file is, read back from disk.

    Raises:
        UserError: as for `load`, an output that cannot be written, or a family that is left open.
    """
    info, tensors = load(path, family, check_finite=True, use_ema=use_ema)
    if info.guessed:
        raise UserError(f"{info.warnings[0]} The family is written into the new file, so it must be named.")
    if dtype is not None and any(QUANTIZATION.search(name) for name in tensors):
        raise UserError(
            f"{Path(path).name} holds scaled fp8 weights, which stay as they are; leave the type unchanged."
        )
    magi = info.family in MAGI_FAMILIES
    if magi and dtype is not None:
        raise UserError("MAGI-1 needs some of its weights in float32; leave the type unchanged.")
    if special_tokens is not None and not magi:
        raise UserError(f"Special tokens belong to MAGI-1, and {Path(path).name} is {info.family}; leave them out.")
    if special_tokens is not None:
        tensors |= SpecialTokens.from_file(special_tokens).tensors()
    if lora is not None and (magi or any(QUANTIZATION.search(name) for name in tensors)):
        raise UserError(
            f"A LoRA is merged into a network of the Wan layout whose weights are not scaled, and {Path(path).name} is "
            f"another; leave it out, or take ComfyUI's LoRA loader."
        )
    merged = {} if lora is None else {"changed": Lora(lora, tensors).merged}
    write_safetensors(tensors, stamp(info), Path(out), dtype, progress, **merged)
    written = inspect(out)
    if written.family != info.family or written.config != info.config:
        raise UserError(
            f"{out} reads back as {written.family} {written.config}, not as it was written; check the disk."
        )
    return written
