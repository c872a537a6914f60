"""Where runs are kept on disk, and what of a model tells one run from another."""

from dataclasses import dataclass, replace
from pathlib import Path

import folder_paths

from ...flowcache_core.settings import Settings
from . import patch as host
from .checks import COMPILED
from .gpus import GPUS
from .guider import FAMILY, FPS, LOW, WARNINGS, low_network
from .longvie import LED

PLACES = (  # of the host's patcher, where nodes hang what changes a run
    "object_patches",
    "weight_wrapper_patches",
    "hook_patches",
    "injections",
    "callbacks",
    "attachments",
)


@dataclass(frozen=True)
class ResumeSettings:
    """That a run is kept on disk.

    Attributes:
        limit: bytes that all such runs may take.
        goes_on: where a chunk cannot be kept, the run goes on without being kept any more.
    """

    limit: int
    goes_on: bool = False


def root() -> Path:
    """The one folder of all runs, in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "flowcache" / "runs"


def weights_of(model) -> list:
    """A few numbers of each weight, patches (LoRA) on them, and how FlowCache and the loader set the model up."""
    networks = [one for one in (model.model.diffusion_model, low_network(model)) if one is not None]
    weights = [
        (name, tuple(weight.shape), str(weight.dtype), weight.detach().flatten()[:: max(1, weight.numel() // 8)][:8])
        for network in networks
        for name, weight in network.named_parameters()
        if not weight.is_meta
    ]
    options = model.model_options.get("transformer_options", {})
    patch = host.patch_of(model.model_options)
    settings, dtype = patch and _deciding(patch.settings), str(host.compute_dtype(model.model))
    patches = [dict(one.patches) for one in (model, *model.get_additional_models_with_key(LOW))]
    return [weights, *patches, [options.get(FAMILY), options.get(FPS), settings, dtype]]


def _deciding(settings: Settings) -> Settings:
    """Settings without those that change where and when things are done, but not the result."""
    return replace(settings, overlap=True, history=replace(settings.history, memory="auto"))


def patches_of(model) -> list:
    """Everything that other nodes have hung on a model and that a run of ours heeds."""
    options = dict(model.model_options)
    inside = options.pop("transformer_options", {})
    ours = (host.KEY, COMPILED)
    wrappers = [
        {kind: {key: one for key, one in held.items() if key not in ours} for kind, held in found.items()}
        for found in (inside.get("wrappers", {}), model.wrappers)
    ]
    told = (host.KEY, FAMILY, FPS, GPUS, WARNINGS, LED, "wrappers")
    other = {name: value for name, value in inside.items() if name not in told}
    more = set(model.additional_models) - {"multigpu"}  # copies of the same on other devices
    places = {name: getattr(model, name, None) for name in PLACES}
    heard = getattr(model, "callbacks", {}).items()
    places["callbacks"] = {
        kind: {key: one for key, one in held.items() if key != GPUS} for kind, held in heard if set(held) != {GPUS}
    }
    led = inside[LED].determining() if LED in inside else []
    return [options, other, wrappers, more, list(places.values()), led]
