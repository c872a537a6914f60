"""Where runs are kept on disk, and what tells one run from another."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...flowcache_core.settings import Settings
from . import patch as host
from .guider import FAMILY, FPS

LARGE = 2**22  # elements; of larger tensors so many are looked at


@dataclass(frozen=True)
class ResumeSettings:
    """That a run is kept on disk, and how many bytes all such runs may take."""

    limit: int


def root() -> Path:
    """The one folder of all runs, in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory()) / "flowcache" / "runs"


def weights_of(model) -> list:
    """A few numbers of each weight, patches (LoRA) on them, and how FlowCache and the loader set the model up."""
    network = model.model.diffusion_model
    weights = [
        (name, tuple(weight.shape), str(weight.dtype), weight.detach().flatten()[:: max(1, weight.numel() // 8)][:8])
        for name, weight in network.named_parameters()
        if not weight.is_meta
    ]
    options = model.model_options.get("transformer_options", {})
    patch = host.patch_of(model.model_options)
    settings, dtype = patch and _deciding(patch.settings), str(host.compute_dtype(model.model))
    return [weights, dict(model.patches), [options.get(FAMILY), options.get(FPS), settings, dtype]]


def _deciding(settings: Settings) -> Settings:
    """Settings without those that change where and when things are done, but not the result."""
    return replace(settings, overlap=True, history=replace(settings.history, memory="auto"))


def digest(*what) -> str:
    """32 hexadecimal digits. What cannot be looked into counts as different every time."""
    found = hashlib.sha256()
    for part in what:
        _feed(found, part)
    return found.hexdigest()[:32]


def _feed(found, part) -> None:
    if isinstance(part, Tensor):
        flat = part.detach().flatten()
        flat = flat[:: max(1, flat.numel() // LARGE)].contiguous().cpu()
        found.update(f"tensor {tuple(part.shape)} {part.dtype}".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(part, Mapping):
        _feed(found, [(name, part[name]) for name in sorted(part, key=str)])
    elif is_dataclass(part) and not isinstance(part, type):
        _feed(found, [type(part).__name__, *((field.name, getattr(part, field.name)) for field in fields(part))])
    elif isinstance(part, Sequence) and not isinstance(part, (str, bytes)):
        found.update(f"list {len(part)}".encode())
        for item in part:
            _feed(found, item)
    elif hasattr(part, "weights"):  # the host's weight adapters
        _feed(found, [type(part).__name__, part.weights])
    elif part is None or isinstance(part, (str, bytes, int, float, bool)):
        found.update(repr((type(part).__name__, part)).encode())
    else:
        found.update(uuid.uuid4().bytes)
