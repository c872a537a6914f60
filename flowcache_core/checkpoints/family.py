"""Which family of models a checkpoint is of.

Told from names, shapes and metadata, never from the file's name. Many families share the Wan 2.1 text-to-video layout
to the last tensor; those are told apart by a stamp that `convert` writes, or by the user.
"""

from pathlib import Path
from typing import cast

from torch import Tensor

from ..errors import UserError, one_line
from ..models.latent_spaces import is_deep
from ..models.longvie import LongVieConfig
from ..models.wan import WanConfig
from ..storage.files import parse_json
from .sizes import QUANTIZATION
from .weight_files import WeightFile

FAMILIES = {
    "causal": "Self-Forcing, Causal-Forcing",
    "causvid": "CausVid",
    "skyreels": "SkyReels-V2 diffusion forcing",
    "rolling": "Rolling Forcing",
    "longlive": "LongLive",
    "krea": "Krea Realtime",
    "longlive 2": "LongLive 2.0 5B",
    "experts": "FastVideo's Self-Forcing of Wan 2.2 A14B, one of its two networks",
    "wan": "plain Wan 2.1, which was not trained to go chunk by chunk",
    "longvie": "LongVie 2: Wan 2.1 image to video with its control layers",
    "magi": "MAGI-1, base",
    "magi distilled": "MAGI-1, distilled, quantised or not",
    "demo": "the model that ships",
}
MAGI_FAMILIES = ("magi", "magi distilled")
# Read by ComfyUI as causal AR.
CAUSAL_FAMILIES = ("causal", "causvid", "rolling", "longlive", "krea", "experts", "demo")
CAUSAL_CLASSES = ("CausalWanModel", "CausalWanTransformer3DModel")  # upstreams' own; FastVideo's
DEEP_FAMILIES = ("longlive 2", "wan")  # with the 48 channels of Wan 2.2's 5B
OF_TWO_NETWORKS = ("experts",)  # of which a file holds one
STAMP = "flowcache"  # metadata key, beside ComfyUI's own "config"


def wan_families() -> list[str]:
    """Lists the families of the Wan text-to-video layout that are one network, but for the one that ships."""
    return [name for name in FAMILIES if name not in (*MAGI_FAMILIES, *OF_TWO_NETWORKS, "demo", "longvie")]


def possible_families(config: WanConfig) -> list[str]:
    """Lists those that share a layout to the last tensor."""
    if is_deep(config.out_dim):
        return list(DEEP_FAMILIES)
    return [name for name in (*wan_families(), *OF_TWO_NETWORKS) if name == "wan" or name not in DEEP_FAMILIES]


def transformer_settings(path: Path, file: WeightFile, tensors: dict[str, Tensor]) -> tuple[dict, tuple[str, ...]]:
    """Reads what the metadata and a config.json beside the weights say of the network; the metadata wins.

    Args:
        tensors: under Wan 2.1's names, by which a config.json of another model is known.

    Returns:
        The settings, and a line if the config.json is of another network.

    Raises:
        UserError: the metadata is no JSON object.
    """
    told, notes = file.settings, cast(tuple[str, ...], ())
    heads, head = told.get("num_attention_heads"), told.get("attention_head_dim")
    width = told.get("dim") or (heads * head if isinstance(heads, int) and isinstance(head, int) else None)
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    theirs = (width, told.get("num_layers", blocks), bool(told.get("inject_sample_info")))
    shape = tensors["patch_embedding.weight"].shape if "patch_embedding.weight" in tensors else ()
    ours = (next(iter(shape), 0), blocks, "fps_embedding.weight" in tensors)
    if theirs != ours:
        told = {}
        if width is not None:
            found = f"width, blocks and frame rate {theirs}, expected {ours}"
            notes = (
                one_line(f"The config.json beside {path.name} is of another network ({found}), so it is not heeded."),
            )
    try:
        return told | parse_json(file.metadata.get("config", "{}")).get("transformer", {}), notes
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path.name} has metadata 'config' that is not a JSON object; download it again.") from error


def family_of(
    path: Path, file: WeightFile, config: WanConfig | None, settings: dict, asked: str
) -> tuple[str, tuple[str, ...]]:
    """Tells the family, and what the user should know about how sure that is.

    Args:
        config: of a network of the Wan 2.1 layout; None of MAGI-1.
        settings: as `transformer_settings` read them.
        asked: "auto", or what the user says it is.

    Raises:
        UserError: the file cannot be what was asked for, or its stamp is broken.
    """
    found, warnings = _told_family(path, file, config, settings)
    if config is None:
        possible = list(MAGI_FAMILIES)
    elif isinstance(config, LongVieConfig):
        possible = ["longvie"]
    elif config.fps:
        possible = ["skyreels"]
    else:
        possible = ["demo"] if found == "demo" else possible_families(config)
    family = found if asked == "auto" else asked
    if family not in possible:
        kind = "MAGI-1's names" if config is None else "an fps embedding" if config.fps else "the Wan 2.1 layout"
        kind = {"demo": "the demo model's stamp", "longvie": "LongVie 2's control layers"}.get(found, kind)
        raise UserError(f"{path.name} has {kind}, so it cannot be {family!r}; choose {' or '.join(possible)}.")
    stamped = STAMP in file.metadata or family not in CAUSAL_FAMILIES  # ComfyUI's own flag tells no causal ones apart
    if family != found and not warnings and stamped:
        return family, (
            f"{path.name} says that it is {found}, and is run as {family}, as you chose; auto takes {found}.",
        )
    return family, warnings if asked == "auto" else ()


def _told_family(path: Path, file: WeightFile, config: WanConfig | None, settings: dict) -> tuple[str, tuple[str, ...]]:
    if STAMP in file.metadata:
        try:
            family = parse_json(file.metadata[STAMP])["family"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path.name} has a broken {STAMP!r} stamp; convert it again from its source.") from error
        if not isinstance(family, str) or family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(f"{path.name} is stamped {family!r}, expected one of {known}; update FlowCache.")
        return family, ()
    if isinstance(config, LongVieConfig):
        return "longvie", ()
    if config is None:
        if any(QUANTIZATION.search(name) for name in file.tensors):  # only distilled ones are published in fp8
            return "magi distilled", ()
        if file.folder.startswith("inference_weight"):  # where upstream's loader looks, and nothing else tells it
            return "magi distilled" if file.folder.endswith(".distill") else "magi", ()
        return "magi", (
            f"{path.name} may be a base or a distilled MAGI-1, taken as base: choose magi distilled for that.",
        )
    # Only SkyReels-V2's config.json speaks of sample info, diffusers writes its class, and repackers mark it.
    marked = any("model_type.SkyReels-V2-DF" in name for name in file.tensors)
    kind = settings.get("_class_name")
    if config.fps or marked or "inject_sample_info" in settings or kind == "SkyReelsV2Transformer3DModel":
        return "skyreels", ()
    causal = settings.get("causal_ar")
    if is_deep(config.out_dim) and (causal or file.wrapper.startswith("generator") or kind in CAUSAL_CLASSES):
        return "longlive 2", ()
    if causal:
        return "causal", ()
    if file.wrapper.startswith("generator") or kind in CAUSAL_CLASSES:
        return "causal", (
            f"{path.name} may be causal, causvid, rolling, longlive or krea, taken as causal: choose the family for "
            "CausVid, Rolling Forcing, LongLive or Krea Realtime.",
        )
    choices = "; ".join(f"{name} ({FAMILIES[name]})" for name in possible_families(config))
    return "wan", (
        f"{path.name} has the Wan 2.1 layout and no stamp, taken as plain Wan 2.1: choose its family: {choices}.",
    )
