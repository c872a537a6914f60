"""What other nodes have hung on a network of the Wan layout: heeded as ComfyUI's own forward does, or named."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import comfy.ldm.flux.math
from torch import Tensor, nn

from ...flowcache_core.history.cache import Attention
from ...flowcache_core.models.wan import Conditioning
from ...flowcache_core.solvers.weights import joined

OVERRIDE = "optimized_attention_override"  # the host's key of what stands in for its attention
STOCK = "comfy.ldm.wan."  # where the host's classes of such networks are
BLOCK_PATCHES = ("attn1_patch", "attn2_patch")  # of a WanModel's block
WHOLE = ("forward", "_forward", "forward_orig", "forward_block", "rope_encode", "unpatchify")  # never called


def replaced(module: nn.Module) -> bool:
    """Whether a module's own forward is no longer the host's, or is watched."""
    compiled = hasattr(module, "_orig_mod")  # torch.compile's; its parts are run without it
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return not compiled and (
        "forward" in vars(module) or hooked or not type(module).__module__.startswith((STOCK, "torch."))
    )


def scales(options: Mapping) -> tuple[float, float, float]:
    """Scales of rotary positions in time, rows and columns, as ScaleROPE sets them. Its shifts move queries and keys
    alike, so they change nothing."""
    told = options.get("rope_options") or {}
    time, rows, columns = (float(told.get(f"scale_{axis}", 1.0)) for axis in "tyx")
    return time, rows, columns


def unheeded(network: Any, options: Mapping) -> list[str]:
    """Lines for the report on patches that a run of chunks cannot heed, and on those that the network has no place
    for, in ComfyUI's own forward too."""
    whole = [name for name in WHOLE if name in vars(network)]
    lines = [f"a patch of diffusion_model.{name} has no effect: chunks run without that function" for name in whole]
    if network._forward_hooks or network._forward_pre_hooks:
        lines.append("a hook on the whole network has no effect: chunks run block by block")
    if any(hasattr(block, "_orig_mod") for block in network.blocks):
        lines.append(
            "compiled blocks run as if they were not: chunks attend to a history that torch.compile has not seen"
        )
    known = BLOCK_PATCHES if _takes_patches(network) else ()
    kinds = [name for name, held in (options.get("patches") or {}).items() if held and name not in known]
    places = {
        f"{kind} {' '.join(map(str, place)) if isinstance(place, tuple) else place}"
        for kind, held in (options.get("patches_replace") or {}).items()
        for place in held
        if kind != "dit" or not _is_block(place, network)
    }
    if kinds or places:
        names = ", ".join([*kinds, *sorted(places)])
        lines.append(f"patches without effect, for a {type(network).__name__} has no such place: {names}")
    return lines


def unheeded_by_magi(
    guider, model_options: Mapping, functions: Iterable[str], wrappers: Iterable[str], own: str
) -> list[str]:
    """A line for the report on what has no effect on MAGI-1, which runs its network and its guidance itself.

    Args:
        guider: the host's.
        functions, wrappers: names in the model's options of what sees or changes the guider's results.
        own: key of our wrappers.
    """
    options = model_options.get("transformer_options", {})
    found = [name for name in functions if model_options.get(name)]
    found += [name for name in ("patches", "patches_replace", "rope_options") if options.get(name)]
    held = options.get("wrappers", {})
    found += [f"{kind} wrapper" for kind in wrappers if set(held.get(kind, {})) - {own}]
    found += [name for name in guider.model_patcher.object_patches if name.startswith("diffusion_model.")]
    conditions = [one for side in guider.conds.values() for one in side or []]
    found += ["hooks of a prompt"] if any(one.get("hooks") is not None for one in conditions) else []
    return [f"without effect on MAGI-1, which runs its network itself: {', '.join(found)}"] if found else []


def _takes_patches(network: Any) -> bool:
    """Whether the network's blocks call attn1_patch and attn2_patch, as those of a causal one do not."""
    return not hasattr(network, "init_kv_caches")


def _is_block(place, network: Any) -> bool:
    return isinstance(place, tuple) and place[0] == "double_block" and place[1] in range(len(network.blocks))


class ModelPatches:
    """Patches of one call of the network; its blocks then run as the host's own modules, with their attention to a
    chunk itself led to the history.

    Args:
        network: the host's.
        options: the transformer options of the call.
        size: height and width of the latent.
        stores: whether a history is to find something of every layer, skipped ones too.
    """

    @classmethod
    def of(cls, network: Any, options: dict, size: tuple[int, int], stores: bool) -> "ModelPatches | None":
        """Gives the patches of a call; None where there are none, and blocks run as ours."""
        found = cls(network, options, size, stores)
        if found.whole_block or found.in_place_of or OVERRIDE in options or replaced(network.head):
            return found
        return None

    def __init__(self, network: Any, options: dict, size: tuple[int, int], stores: bool):
        self.network, self.options, self.size, self.stores = network, options, size, stores
        self.in_place_of = (options.get("patches_replace") or {}).get("dit", {})
        patched = any((options.get("patches") or {}).get(name) for name in BLOCK_PATCHES)
        self.whole_block = (patched and _takes_patches(network)) or any(
            replaced(module)
            for block in network.blocks
            for module in (block, getattr(block, "self_attn", block), getattr(block, "cross_attn", block))
        )
        options |= {"total_blocks": len(network.blocks), "block_type": "double"}
        self._texts: dict[tuple, Tensor] = {}
        self._turns: dict[int, Tensor] = {}

    @property
    def on_blocks(self) -> bool:
        """Whether a block runs as the host's own module, or something in its place."""
        return self.whole_block or bool(self.in_place_of)

    def block(
        self, layer: int, x: Tensor, conditioning: Conditioning, attend: Attention, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Runs a block, or what stands in for it, over tokens [rows, T, S, dim] of one chunk or window."""
        self.options["block_index"] = layer
        patch = self.in_place_of.get(("double_block", layer))
        if patch is None and not self.whole_block:
            return plain()
        turns, texts = self._turns_of(x), self._text_of(conditioning)
        asked = _Once(attend)
        run = partial(self._run, layer, asked, turns)
        given = {"img": x.flatten(1, 2), "txt": texts, "vec": conditioning.modulation, "pe": turns}
        given["transformer_options"] = self.options
        if patch is None:
            return run(given)["img"].view_as(x)
        result = patch(given, {"original_block": run})["img"].view_as(x)
        if (
            self.stores and not asked.done
        ):  # later chunks look at this layer all the same, and would find nothing of this one
            run(given)
        return result

    def head(self, tokens: Tensor, embedding: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """Gives patches of tokens, by the network's own head where that is another."""
        if not replaced(self.network.head):
            return plain()
        return self.network.head(tokens.flatten(1, 2), embedding).unflatten(1, tokens.shape[1:3])

    def _run(self, layer: int, attend: "_Once", turns: Tensor, given: dict) -> dict:
        """The host's own block. It turns queries and keys by their place in the chunk, which is taken back before they
        go to the history."""
        options, block = given["transformer_options"], self.network.blocks[layer]
        other = options.get(OVERRIDE)
        options[OVERRIDE] = partial(_led, attend, turns.transpose(-1, -2), other)
        try:
            image = getattr(block, "_orig_mod", block)(
                given["img"], e=given["vec"], freqs=given["pe"], context=given["txt"], context_img_len=None,
                transformer_options=options,
            )  # fmt: skip
        finally:
            del options[OVERRIDE]
            options |= {} if other is None else {OVERRIDE: other}
        return {"img": image}

    def _text_of(self, conditioning: Conditioning) -> Tensor:
        """The embedded texts of a chunk's rows, [rows, tokens, dim]."""
        contexts = conditioning.texts[0]
        key = tuple(map(id, contexts))
        if key not in self._texts:
            tokens = math.lcm(*(context.text.shape[1] for context in contexts))
            # As the host does: a text that is said several times over is attended to as if it were said once.
            texts = [context.text.repeat(1, tokens // context.text.shape[1], 1) for context in contexts]
            self._texts[key] = self.network.text_embedding(joined(texts))
        return self._texts[key]

    def _turns_of(self, x: Tensor) -> Tensor:
        """The host's rotary table of a chunk that stands at the beginning."""
        frames = x.shape[1]
        if frames not in self._turns:
            more: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
            if "rope_options" in self.options:  # an older host knows none
                more["transformer_options"] = self.options
            self._turns[frames] = self.network.rope_encode(frames, *self.size, **more)
        return self._turns[frames]


class _Once:
    """A block's attention to the history, which is the first that it calls."""

    def __init__(self, attend: Attention):
        self.attend, self.done = attend, False


def _led(once: _Once, back: Tensor, other: Callable | None, plain: Callable, q, k, v, heads: int, *args, **kwargs):
    """Stands in for the host's attention inside a block: the first time it goes to the history."""
    if once.done:
        return (
            plain(q, k, v, heads, *args, **kwargs) if other is None else other(plain, q, k, v, heads, *args, **kwargs)
        )
    once.done = True
    if not kwargs.get("skip_reshape"):
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    q, k = (comfy.ldm.flux.math.apply_rope1(part.transpose(1, 2), back).transpose(1, 2) for part in (q, k))
    answer = once.attend(q, k, v)
    return answer if kwargs.get("skip_output_reshape") else answer.transpose(1, 2).flatten(2)
