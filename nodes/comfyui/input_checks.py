"""What a node's inputs hold, looked at before the node runs.

The server refuses numbers out of range and links of the wrong type. It lets pass NaN, any value in place of a link, and
whatever a linked node really gave.
"""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Integral, Real

from comfy_api.latest import io
from torch import Tensor, isfinite

from ...flowcache_core.checkpoints import MAGI_FAMILIES
from ...flowcache_core.errors import UserError
from ...flowcache_core.report import Report
from ...flowcache_core.storage.state import State
from . import patch as host
from .checks import RAYLIGHT, check_network, of_raylight
from .resume import ResumeSettings
from .stream import StreamSettings


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, which now runs only with inputs that it can use; its `execute` raises UserError for others.

    Inputs that are not given get the default of their definition, or None where that has none.
    """
    execute = node.execute.__func__
    if hasattr(execute, "__wrapped__"):  # the host has asked for the nodes before
        return node

    @wraps(execute)
    def guarded(cls, **given) -> io.NodeOutput:
        for one in node.define_schema().inputs:  # anew, because the files in its lists come and go
            if given.get(one.id) is None:
                given[one.id] = getattr(one, "default", None)
            value = given[one.id]
            if value is None:
                if not one.optional:
                    raise UserError(f"The input '{one.id}' is empty; connect a {one.io_type}.")
            elif complaint := CHECKS[str(one.io_type)](value) or _unlisted(one, value):
                raise UserError(f"The input '{one.id}' {complaint}.")
        return execute(cls, **given)

    node.execute = classmethod(guarded)
    return node


Check = Callable[[object], str | None]  # what is wrong with a value, if anything


def _is(kind: type, wanted: str) -> Check:
    """A check of nothing but the type."""
    return lambda value: None if isinstance(value, kind) else f"holds a {_kind(value)}; {wanted}"


def _number(value) -> str | None:
    if not isinstance(value, Real):
        return f"holds a {_kind(value)}; give a number"
    return None if math.isfinite(value) else f"is {value}; give a number"


def _unlisted(one: io.Input, value) -> str | None:
    if not isinstance(one, io.Combo.Input) or value in one.options:
        return None
    return f"is {value!r:.60}, which its list does not have; choose a name from the list"


def _text(value) -> str | None:
    if not isinstance(value, str):
        return f"holds a {_kind(value)}; give a text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds halves of characters; write it anew"
    return None


def _model(value) -> str | None:
    if of_raylight(value):
        return RAYLIGHT
    if not hasattr(value, "model_options") or not hasattr(getattr(value, "model", None), "diffusion_model"):
        return f"holds a {_kind(value)}, no model; connect the output of a model loader"
    if host.family_of(value) not in MAGI_FAMILIES:
        check_network(value.model.diffusion_model)
    return None


def _vae(value) -> str | None:
    unread = getattr(value, "first_stage_model", value) is None
    if unread or not hasattr(value, "decode") or not hasattr(value, "encode"):
        return f"holds a {_kind(value)}, no VAE that could be read; connect the output of a VAE loader"
    return None


def _clip(value) -> str | None:
    if not hasattr(value, "tokenize") or not hasattr(value, "encode_from_tokens_scheduled"):
        return f"holds a {_kind(value)}, no text encoder; connect the output of a CLIP loader"
    return None


def _clip_vision(value) -> str | None:
    if not hasattr(value, "encode_image"):
        return f"holds a {_kind(value)}, no image encoder; connect the output of Load CLIP Vision"
    return None


def _conditioning(value) -> str | None:
    if not isinstance(value, list) or not all(_is_pair(pair) for pair in value):
        return f"holds a {_kind(value)}, no prompt; connect the output of a prompt node"
    if not value:
        return "holds no prompt; connect the output of a prompt node"
    for embedding in {id(embedding): embedding for embedding, _ in value}.values():
        if embedding.ndim != 3 or 0 in embedding.shape:
            return f"holds an embedding of shape {list(embedding.shape)}, expected [batch, tokens, width]"
        if not isfinite(embedding).all():
            return "holds NaN or infinite values; check the node that made it"
    return None


def _is_pair(pair) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return isinstance(pair[0], Tensor) and isinstance(pair[1], Mapping)


def _latent(value) -> str | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("samples"), Tensor):
        return f"holds a {_kind(value)}, no latent; connect the output of a node that makes latents"
    return None


def _image(value) -> str | None:
    if not isinstance(value, Tensor):
        return f"holds a {_kind(value)}, no images; connect the output of a node that makes images"
    if value.ndim != 4 or value.shape[-1] < 3 or 0 in value.shape:
        return f"holds images of shape {list(value.shape)}, expected [frames, height, width, 3]; give frames in colour"
    if not all(isfinite(frame).all() for frame in value):
        return "holds NaN or infinite values; check the node that made it"
    return None


def _audio(value) -> str | None:
    waveform = value.get("waveform") if isinstance(value, Mapping) else None
    if not isinstance(waveform, Tensor) or not isinstance(value.get("sample_rate"), Integral):
        return f"holds a {_kind(value)}, no sound; connect the output of Load Audio"
    if waveform.ndim != 3 or 0 in waveform.shape:
        return f"holds sound of shape {list(waveform.shape)}, expected [1, channels, samples]"
    return None if isfinite(waveform).all() else "holds NaN or infinite values; check the node that made it"


def _video(value) -> str | None:
    if not hasattr(value, "get_components"):
        return f"holds a {_kind(value)}, no video; connect the output of Load Video"
    return None


def _kind(value) -> str:
    return type(value).__name__


OURS = "connect the output of that name of a FlowCache node"
CHECKS: dict[str, Check] = {
    "FLOAT": _number,
    "INT": _is(Integral, "give a whole number"),
    "BOOLEAN": _is(bool, "give true or false"),
    "COMBO": _is(str, "give one of the names in its list"),
    "STRING": _text,
    "MODEL": _model,
    "VAE": _vae,
    "CLIP": _clip,
    "CLIP_VISION": _clip_vision,
    "CONDITIONING": _conditioning,
    "LATENT": _latent,
    "IMAGE": _image,
    "VIDEO": _video,
    "AUDIO": _audio,
    "FLOWCACHE_STATE": _is(State, OURS),
    "FLOWCACHE_REPORT": _is(Report, OURS),
    "FLOWCACHE_STREAM": _is(StreamSettings, OURS),
    "FLOWCACHE_RESUME": _is(ResumeSettings, OURS),
}
