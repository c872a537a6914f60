"""Whose names a file uses, and its tensors under Wan 2.1's (or MAGI-1's)."""

import re
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .others import refuse_others
from .weight_files import ATTENTION

# Names of the diffusers library's WanTransformer3DModel and SkyReelsV2Transformer3DModel, longest first where one
# begins with another. Its norm2 is Wan's norm3; the other norms of a block have no weights.
DIFFUSERS_NAMES = {
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "fps_projection.net.0.proj.": "fps_projection.0.",
    "fps_projection.net.2.": "fps_projection.2.",
    "proj_out.": "head.head.",
}
DIFFUSERS_BLOCK_NAMES = {
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "o.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "norm2.": "norm3.",
}
# Queries, keys and values in one layer; diffusers' `fuse_qkv_projections` keeps the separate ones beside it.
FUSED = re.compile(r"(.*attn\.)(?:to_)?(q?kv)\.(\w+)")
LONGVIE_FOLDER = (
    "put control.safetensors and dit.safetensors into one folder with Wan2.1-I2V-14B-480P, and give the folder"
)
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def layout_of(path: Path, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Tells what stands before every name, and whose names they are: "wan", "diffusers" or "magi".

    Raises:
        UserError: another architecture, or no network of a video model.
    """
    for entrance, layout in (("patch_embedding.weight", "wan"), ("x_embedder.weight", "magi")):
        for name in tensors:
            if name == entrance or name.endswith("." + entrance):
                prefix = name.removesuffix(entrance)
                if layout == "wan" and f"{prefix}proj_out.weight" in tensors:
                    layout = "diffusers"
                if layout != "magi" or any(other.startswith(f"{prefix}videodit_blocks.") for other in tensors):
                    return prefix, layout
    if not any("lora_" in name for name in tensors):
        refuse_others(path, tensors)
    kinds = {
        "control_blocks_dense.": f"LongVie 2's control layers; {LONGVIE_FOLDER}",
        "lora_": "a LoRA; load it with a LoRA loader node on top of a model",
        "decoder.": "a VAE; load it with a VAE loader node",
        "token_embedding": "a text encoder; load it with a CLIP loader node",
        "encoder.block.": "a text encoder; load it with a CLIP loader node",
    }
    for mark, kind in kinds.items():
        if any(mark in name for name in tensors):
            raise UserError(f"{path.name} looks like {kind} (expected a video model of the Wan 2.1 or MAGI-1 layout).")
    if tensors and all(ATTENTION.search(name) for name in tensors):
        raise UserError(f"{path.name} looks like LongVie 2's attention layers; {LONGVIE_FOLDER}.")
    names = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{path.name} holds {len(tensors)} tensors like {names}; expected the Wan 2.1 or MAGI-1 layout: "
        "choose another file."
    )


def renamed(tensors: dict[str, Tensor], prefix: str, layout: str) -> dict[str, Tensor]:
    """Puts the tensors under `prefix` by Wan 2.1's (or MAGI-1's) names; others are left out.

    Args:
        layout: as `layout_of` told it.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        name = from_diffusers(name) if layout == "diffusers" else name
        fused = FUSED.fullmatch(name) if layout != "magi" else None
        if fused:
            front, letters, end = fused.groups()
            shared = tensor.numel() == 1 or end == "comfy_quant"
            parts = len(letters) * [tensor] if shared else tensor.chunk(len(letters))
            for letter, part in zip(letters, parts, strict=False):
                result.setdefault(f"{front}{letter}.{end}", part)
        else:
            result[name] = tensor
    return result


def from_diffusers(name: str) -> str:
    """A tensor's name under Wan 2.1's layout, from the one that the diffusers library gives it."""
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation")
    block = re.match(r"blocks\.\d+\.", name)
    for theirs, ours in (DIFFUSERS_BLOCK_NAMES if block else DIFFUSERS_NAMES).items():
        name = name.replace(theirs, ours)
    return name
