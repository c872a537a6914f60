"""Which family a checkpoint is of, its sizes, and its weights under one set of names.

Told from names, shapes and metadata, never from the file's name. Many families share the Wan 2.1 text-to-video layout
to the last tensor; those are told apart by a stamp that `convert` writes, or by the user.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..errors import UserError
from ..models.magi.config import MagiConfig
from ..models.magi.network import MagiNetwork
from ..models.magi.text import TOKEN_PREFIX, SpecialTokens
from ..models.wan import WanConfig, WanNetwork
from ..storage.files import parse_json
from .weight_files import Progress, WeightFile, open_weights, write_safetensors

FAMILIES = {
    "causal": "Self-Forcing, Causal-Forcing",
    "causvid": "CausVid",
    "skyreels": "SkyReels-V2 diffusion forcing",
    "rolling": "Rolling Forcing",
    "wan": "plain Wan 2.1, which was not trained to go chunk by chunk",
    "magi": "MAGI-1, base",
    "magi distilled": "MAGI-1, distilled, quantised or not",
    "demo": "the model that ships",
}
MAGI_FAMILIES = ("magi", "magi distilled")
CAUSAL_FAMILIES = ("causal", "causvid", "rolling", "demo")  # read by ComfyUI as causal AR
STAMP = "flowcache"  # metadata key, beside ComfyUI's own "config"

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
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Scales that fp8 files carry beside a weight, as ComfyUI writes them.
QUANTIZATION = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$")


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
        warnings: one line each, for the user.
    """

    family: str
    config: WanConfig | MagiConfig
    dtype: torch.dtype
    layout: str
    prefix: str
    metadata: dict[str, str]
    bytes: int
    warnings: tuple[str, ...] = ()


def inspect(path: str | Path, family: str = "auto", use_ema: bool = True) -> CheckpointInfo:
    """Tells what a file, a folder or an index of shards is, without reading the weights.

    Args:
        family: "auto", or a key of `FAMILIES` to overrule what the file says.

    Raises:
        UserError: not weights, another architecture, parts missing, or a family that the file cannot be.
    """
    return load(path, family, use_ema=use_ema)[0]


def load(
    path: str | Path, family: str = "auto", check_finite: bool = False, use_ema: bool = True
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """What a checkpoint is, and its weights, mapped from disk, under Wan 2.1's (or MAGI-1's) names.

    Args:
        family: as for `inspect`.
        check_finite: also read every weight and refuse NaN and infinity.
        use_ema: of a torch file that has both, take "generator_ema" rather than "generator".

    Raises:
        UserError: as for `inspect`; or a weight that is NaN or infinite, by name.
    """
    path = Path(path)
    if family != "auto" and family not in FAMILIES:
        raise UserError(f"The family {family!r} is unknown; choose auto or one of {', '.join(FAMILIES)}.")
    file = open_weights(path, use_ema)
    prefix, layout = _layout(path, file.tensors)
    tensors = _rename(file.tensors, prefix, layout)
    settings = _transformer_settings(path, file)
    wan = None if layout == "magi" else _wan_config(path, tensors, settings)
    if wan is not None:
        _check_names_and_shapes(path, tensors, wan)
    family, warnings = _family(path, file, wan, settings, family)
    config: WanConfig | MagiConfig
    if wan is not None:
        config = wan
    else:
        config = MagiConfig.from_tensors(tensors, distilled=family == "magi distilled")
        _check_names_and_shapes(path, tensors, config)
    first = "videodit_blocks.layers.0.self_attention.linear_qkv" if layout == "magi" else "blocks.0.self_attn"
    dtype = tensors[f"{first}.q.weight"].dtype
    if check_finite:
        _check_finite(path, tensors)
    return CheckpointInfo(family, config, dtype, layout, prefix, file.metadata, file.bytes, warnings), tensors


def load_state_dict(path: str | Path, check_finite: bool = False) -> dict[str, Tensor]:
    """The weights alone; see `load`."""
    return load(path, check_finite=check_finite)[1]


def stamp(info: CheckpointInfo) -> dict[str, str]:
    """Metadata for a file of this family: our stamp, and what ComfyUI's stock loader wants to know."""
    try:
        host = parse_json(info.metadata.get("config", "{}"))
    except ValueError:
        host = {}
    transformer = dict(host.get("transformer", {}))
    transformer.pop("causal_ar", None)
    if info.family in CAUSAL_FAMILIES:
        transformer["causal_ar"] = True
    if isinstance(info.config, WanConfig) and info.config.num_heads != info.config.dim // 128:
        transformer["num_heads"] = info.config.num_heads
    if isinstance(info.config, WanConfig) and info.config.text_dim != 4096:
        transformer["text_dim"] = info.config.text_dim
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
) -> CheckpointInfo:
    """Writes a checkpoint of any layout as one stamped safetensors file that ComfyUI's stock loader reads, or our own
    loader, if it is MAGI-1.

    Nothing half-written is left behind, and memory stays at one tensor.

    Args:
        family: as for `inspect`; must be told where the file cannot tell.
        dtype: of the matrices in the new file; None leaves all weights as they are.
        progress: called with bytes written and bytes in all.
        special_tokens: MAGI-1's special_tokens.npz, to be put into the file.

    Returns:
        What the new file is, read back from disk.

    Raises:
        UserError: as for `load`, an output that cannot be written, or a family that is left open.
    """
    info, tensors = load(path, family, check_finite=True, use_ema=use_ema)
    if info.warnings and family == "auto":
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
    write_safetensors(tensors, stamp(info), Path(out), dtype, progress)
    written = inspect(out)
    if written.family != info.family or written.config != info.config:
        raise UserError(
            f"{out} reads back as {written.family} {written.config}, not as it was written; check the disk."
        )
    return written


def _layout(path: Path, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """What stands before every name, and whose names they are."""
    for entrance, layout in (("patch_embedding.weight", "wan"), ("x_embedder.weight", "magi")):
        for name in tensors:
            if name == entrance or name.endswith("." + entrance):
                prefix = name.removesuffix(entrance)
                if layout == "wan" and f"{prefix}proj_out.weight" in tensors:
                    layout = "diffusers"
                if layout != "magi" or any(other.startswith(f"{prefix}videodit_blocks.") for other in tensors):
                    return prefix, layout
    kinds = {
        "lora_": "a LoRA; load it with a LoRA loader node on top of a model",
        "decoder.": "a VAE; load it with a VAE loader node",
        "token_embedding": "a text encoder; load it with a CLIP loader node",
        "encoder.block.": "a text encoder; load it with a CLIP loader node",
    }
    for mark, kind in kinds.items():
        if any(mark in name for name in tensors):
            raise UserError(f"{path.name} looks like {kind} (expected a video model of the Wan 2.1 or MAGI-1 layout).")
    names = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{path.name} holds {len(tensors)} tensors like {names}; expected the Wan 2.1 or MAGI-1 layout: "
        "choose another file."
    )


def _rename(tensors: dict[str, Tensor], prefix: str, layout: str) -> dict[str, Tensor]:
    """The tensors under `prefix`, by upstream's names."""
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        renamed[_from_diffusers(name) if layout == "diffusers" else name] = tensor
    return renamed


def _from_diffusers(name: str) -> str:
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation")
    block = re.match(r"blocks\.\d+\.", name)
    for theirs, ours in (DIFFUSERS_BLOCK_NAMES if block else DIFFUSERS_NAMES).items():
        name = name.replace(theirs, ours)
    return name


def _transformer_settings(path: Path, file: WeightFile) -> dict:
    """What the metadata and a config.json beside the weights say of the network; the metadata wins."""
    try:
        return (file.settings or {}) | parse_json(file.metadata.get("config", "{}")).get("transformer", {})
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path.name} has metadata 'config' that is not a JSON object; download it again.") from error


def _wan_config(path: Path, tensors: dict[str, Tensor], settings: dict) -> WanConfig:
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
    num_layers = len({name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.", name)})
    num_heads = settings.get("num_heads", settings.get("num_attention_heads", dim // 128))
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads or dim // num_heads % 2:
        raise UserError(
            f"{path.name} has width {dim} and {num_heads} heads, which does not divide into even heads; put the right "
            'number into its metadata: config = {"transformer": {"num_heads": …}}.'
        )
    return WanConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=in_dim,
        out_dim=shape("head.head.weight")[0] // math.prod(patch_size),
        text_dim=shape("text_embedding.0.weight")[1],
        freq_dim=shape("time_embedding.0.weight")[1],
        patch_size=cast(tuple[int, int, int], tuple(patch_size)),
        fps="fps_embedding.weight" in tensors,
    )


def _check_names_and_shapes(path: Path, tensors: dict[str, Tensor], config: WanConfig | MagiConfig) -> None:
    """Compares with what a network of these sizes has."""
    magi = isinstance(config, MagiConfig)
    with torch.device("meta"):
        network = MagiNetwork(config) if isinstance(config, MagiConfig) else WanNetwork(config)
    expected = {name: weight.shape for name, weight in network.state_dict().items()}
    lost = [name for name in expected if name not in tensors]
    if lost:
        raise UserError(
            f"{path.name} lacks {lost[0]} and {len(lost) - 1} more of {len(expected)} tensors; it is cut down, or one "
            "shard of several: give the folder or the index.json."
        )
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{path.name} has {name} of shape {list(tensor.shape)}, expected {list(expected[name])} from its other "
                "weights; it is damaged or packed in a way that is not known here: use another file."
            )
        if name not in expected and not (name.startswith(TOKEN_PREFIX) if magi else QUANTIZATION.search(name)):
            layout = "MAGI-1 layout does not know; use one of the published files"
            if not magi:
                layout = (
                    "Wan 2.1 text-to-video layout does not know; it is another kind of Wan (image-to-video, VACE, "
                    "control): use a text-to-video one"
                )
            raise UserError(f"{path.name} has {name}, which the {layout}.")


def _family(
    path: Path, file: WeightFile, config: WanConfig | None, settings: dict, asked: str
) -> tuple[str, tuple[str, ...]]:
    """The family, and what the user should know about how sure that is."""
    found, warnings = _told_family(path, file, config, settings)
    if config is None:
        possible = list(MAGI_FAMILIES)
    elif config.fps:
        possible = ["skyreels"]
    else:
        possible = [name for name in FAMILIES if not name.startswith("magi") and (name != "demo" or found == "demo")]
    family = found if asked == "auto" else asked
    if family not in possible:
        kind = "MAGI-1's names" if config is None else "an fps embedding" if config.fps else "the Wan 2.1 layout"
        raise UserError(f"{path.name} has {kind}, so it cannot be {family!r}; choose {' or '.join(possible)}.")
    return family, warnings if asked == "auto" else ()


def _told_family(path: Path, file: WeightFile, config: WanConfig | None, settings: dict) -> tuple[str, tuple[str, ...]]:
    if STAMP in file.metadata:
        try:
            family = parse_json(file.metadata[STAMP])["family"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path.name} has a broken {STAMP!r} stamp; convert it again from its source.") from error
        if not isinstance(family, str) or family not in FAMILIES:
            raise UserError(
                f"{path.name} is stamped {family!r}, expected one of {', '.join(FAMILIES)}; update FlowCache."
            )
        return family, ()
    if config is None:
        if any(QUANTIZATION.search(name) for name in file.tensors):  # only distilled ones are published in fp8
            return "magi distilled", ()
        return "magi", (
            f"{path.name} may be a base or a distilled MAGI-1, taken as base: choose magi distilled for that.",
        )
    # Only SkyReels-V2's config.json speaks of sample info, and diffusers writes its class.
    if config.fps or "inject_sample_info" in settings or "SkyReels" in str(settings.get("_class_name")):
        return "skyreels", ()
    if settings.get("causal_ar"):
        return "causal", ()
    if file.wrapper.startswith("generator"):
        return "causal", (
            f"{path.name} may be causal, causvid or rolling, taken as causal: choose the family for CausVid or Rolling "
            "Forcing.",
        )
    choices = "; ".join(
        f"{name} ({FAMILIES[name]})" for name in FAMILIES if name != "demo" and not name.startswith("magi")
    )
    return "wan", (
        f"{path.name} has the Wan 2.1 layout and no stamp, taken as plain Wan 2.1: choose its family: {choices}.",
    )


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        pieces = tensor.flatten().split(1 << 20) if tensor.is_floating_point() else ()
        if not all(piece.float().isfinite().all() for piece in pieces):
            raise UserError(f"{path.name} holds NaN or infinity in {name}, expected finite weights; download it again.")
