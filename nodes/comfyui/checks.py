"""What a run of ours in the host cannot do, said before it begins; and results that are no numbers."""

from collections.abc import Mapping, Sequence

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...flowcache_core.errors import UserError
from ...flowcache_core.models.latent_spaces import stride_of
from ...flowcache_core.models.longvie import leads
from ...flowcache_core.models.wan import FRAME_STRIDE

COMPILED = "torch.compile"  # the host's key of a compiled network's wrapper
COMPILE_OPTIONS = "torch_compile_kwargs"  # the host's key of what it compiles with, in model options
COMPILE = "flowcache_compile"  # the same for a run of ours, in transformer_options
NO_CUDA_GRAPHS = "CUDA graphs are left out: they would overwrite what chunks of a tick keep between two layers"
GRAPHS_OFF = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # modes


def adapt_others(model_options: dict) -> list[str]:
    """Brings what other nodes have patched a model with into the form that a run of ours takes it in.

    Returns:
        Lines on what is done with them, for the report.

    Raises:
        UserError: a patch that takes each call of the guider for a step of the whole video, and would mix up the
            chunks.
    """
    if "easycache" in model_options.get("transformer_options", {}):
        raise UserError(
            "The model is patched by EasyCache or LazyCache, which reuse steps of the whole video at once and would "
            "mix up the chunks; remove that node: FlowCache's presets reuse steps chunk by chunk."
        )
    if model_options.get("context_handler") is not None:
        raise UserError(
            "The model is patched with context windows, which cut up the whole video and would cut through the chunks; "
            "remove that node: FlowCache's history budget bounds memory instead."
        )
    return _compile_blocks(model_options)


def _compile_blocks(model_options: dict) -> list[str]:
    """Has the blocks compiled (key `COMPILE`) where a node compiles the forward of a whole video, which chunks do not
    go through."""
    options = model_options.get("transformer_options", {})
    if not options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop(COMPILED, None):
        return []
    asked = {"backend": "inductor", **model_options.get(COMPILE_OPTIONS, {})}
    wanted = {name: value for name, value in asked.items() if value is not None}
    graphs_off = {"backend": "inductor"} if wanted.get("backend") == "cudagraphs" else {}
    if wanted.get("mode") in GRAPHS_OFF:
        graphs_off["mode"] = GRAPHS_OFF[wanted["mode"]]
    options[COMPILE] = taken = wanted | graphs_off
    return [f"the network's blocks are compiled ({taken['backend']})", *([NO_CUDA_GRAPHS] if graphs_off else [])]


RAYLIGHT = (
    "is of Raylight, which runs networks in processes of its own and replaces their blocks; use Load AR Video Model, "
    "and FlowCache over GPUs for several GPUs"
)


def of_raylight(value: object) -> bool:
    """Whether a value is what Raylight's nodes hand on in place of a model (a dictionary of its workers, which a node
    that takes anything lets through), or a model that its code has patched."""
    if isinstance(value, Mapping):
        return "workers" in value
    network = getattr(getattr(value, "model", None), "diffusion_model", None)
    modules = [network, *(part for block in list(getattr(network, "blocks", []))[:1] for part in block.modules())]
    held = [value, *(replaced for module in modules if module is not None for replaced in vars(module).values())]
    held += getattr(value, "object_patches", {}).values()
    for by_kind in (getattr(value, "callbacks", {}), getattr(value, "wrappers", {})):
        held += [one for by_key in by_kind.values() for called in by_key.values() for one in called]
    return any(str(getattr(one, "__module__", "")).startswith("raylight.") for one in held)


def check_network(network: torch.nn.Module) -> None:
    """Raises UserError for a network that cannot be run chunk by chunk."""
    if not all(hasattr(network, part) for part in ("blocks", "patch_embedding", "time_projection")):
        raise UserError(
            f"The model is a {type(network).__name__}; FlowCache runs networks of the Wan 2.1 text-to-video layout. "
            "Load a causal Wan, SkyReels-V2 or the demo model; MAGI-1 is run by Autoregressive Extend."
        )
    if leads(network):
        return
    channels = {getattr(network, dim, 16) for dim in ("in_dim", "out_dim")}
    if getattr(network, "model_type", "t2v") != "t2v" or len(channels) > 1:
        raise UserError(
            "The model is an image-to-video Wan, which is not autoregressive; load a text-to-video layout (causal Wan, "
            "SkyReels-V2, the demo model) and give images as a prefix."
        )


def cut_into_chunks(latent: Tensor, chunk_frames: int, given: int = 0) -> tuple[int, int]:
    """Cuts a latent [B, C, T, H, W] into chunks behind the frames that are given.

    Returns:
        How many there are, and the frames of the last one where it is shorter than the others, else 0.

    Raises:
        UserError: not a video latent, or it has no frames but the given ones.
    """
    if latent.ndim != 5:
        raise UserError(
            f"The latent has shape {tuple(latent.shape)}, expected a video latent [batch, channels, frames, height, "
            f"width]; use EmptyARVideoLatent or another node for videos."
        )
    frames = latent.shape[2] - given
    if frames < 1:
        found = (
            f"{pixel_frames(latent.shape[2])} frames, and {pixel_frames(given)} of them are" if given else "no frames"
        )
        raise UserError(
            f"The video has {found}{' given: nothing is left to sample' if given else ''}; set a larger length."
        )
    return -(-frames // chunk_frames), frames % chunk_frames


def short_note(last_frames: int, chunk_frames: int) -> list[str]:
    """Says for the report that a video's last chunk is a short one, which its model has not seen in training."""
    if not last_frames:
        return []
    return [
        f"the last chunk has {last_frames} of {chunk_frames} latent frames; a length longer by "
        f"{FRAME_STRIDE * (chunk_frames - last_frames)} frames fills it"
    ]


def pixel_frames(frames: int) -> int:
    """Counts the frames that the user sees of a video's first so many latent frames."""
    return max(0, FRAME_STRIDE * frames - (FRAME_STRIDE - 1))


def check_latent(latent: Tensor, channels: int) -> None:
    """Raises UserError for a latent that is no video of that many channels, or not finite."""
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise UserError(
            f"The latent has shape {tuple(latent.shape)}, expected [batch, {channels}, frames, height, width]; use the "
            f"VAE of this model family."
        )
    if 0 in latent.shape:
        raise UserError(f"The latent is empty: its shape is {tuple(latent.shape)}; check the node that made it.")
    if not torch.isfinite(latent).all():
        raise UserError("The latent holds NaN or infinite values; check the node that made it.")


def rounded_notes(stride: int, rest: int, **told: int) -> list[str]:
    """Says for the report which sizes or lengths are rounded down to a multiple of a stride and a rest."""
    rounded = {name: (value - rest) // stride * stride + rest for name, value in told.items()}
    return [
        f"{name} {value} is not of the form {stride}n{f' + {rest}' if rest else ''}: {rounded[name]} is taken"
        for name, value in told.items()
        if rounded[name] != value
    ]


def check_size(shape: Sequence[int]) -> None:
    """Raises UserError for a latent's shape [B, C, T, height, width] that holds no picture."""
    if 0 in shape[-2:]:
        least = stride_of(shape[1])
        raise UserError(f"The video is less than {least} pixels wide or high; set a larger width and height.")


def latent_stride(model) -> int:
    """Pixels of a latent pixel of the host's model, across and down."""
    return stride_of(model.get_model_object("latent_format").latent_channels)


def check_finite(latent: Tensor, what: str) -> None:
    """Raises UserError where a model gave NaN or infinity."""
    if not torch.isfinite(latent).all():
        raise UserError(
            f"The model gave NaN or infinite values for {what}: its weights are damaged, or overflow in this weight "
            f"type; load the file again, or choose another weight type."
        )
