"""The host's guider as guidance of our forwards: it combines branches, we run the network for them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from threading import Lock, local
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import torch
from comfy.cli_args import args
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...flowcache_core.engine.contexts import texts_kept
from ...flowcache_core.engine.forward import Step
from ...flowcache_core.engine.guidance import Again, Network
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.positions import IN_TORCH, RotaryProduct
from ...flowcache_core.models.experts import ExpertsBackbone
from ...flowcache_core.models.families import family
from ...flowcache_core.models.latent_spaces import pixel_size
from ...flowcache_core.models.longvie import leads
from ...flowcache_core.models.magi.network import grouped_attention
from ...flowcache_core.models.skyreels import share_frame_rate
from ...flowcache_core.schedule import ChunkSchedule, Given
from ...flowcache_core.solvers.weights import joined
from .captions import ChunkCaptions
from .checks import COMPILE
from .gpus import Led, refuse
from .model_patches import OVERRIDE, ModelPatches, scales, unheeded

RUN = "flowcache_run"  # key of the guidance in transformer_options, while its run goes on
FPS = "flowcache_fps"  # frames a second that SkyReels-V2 is told, in transformer_options
FAMILY = "flowcache_family"  # the family that our loader found, in transformer_options
LOW = "flowcache_low_noise"  # key of a second network among a model's additional ones
BOUNDARY = "flowcache_boundary"  # the lowest noise level of the first, in transformer_options
WARNINGS = "flowcache_warnings"  # its lines on the file, there too: on a family that was guessed, on the rest

DEVICE = "multigpu_thread_device"  # the host's key of a call's device, where it divides the branches among several

METHODS = ("__call__", "outer_predict_noise", "predict_noise")  # of a guider, one calls the next
FUNCTIONS = (  # of model options, which see or change what the guider gives at a step
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
)
WRAPPERS = (
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)
CHANGING = ("timestep_start", "timestep_end", "hooks", "control")  # of a condition: it is not the same at every step

Ask = Callable[[Tensor, float], Tensor]  # x and noise level -> the guider's clean estimate


def is_plain_sum(guider, options: dict, own: str) -> bool:
    """Says whether a guider gives the same weighted sum of the branches at every step and for every chunk: then a
    tick's chunks can be asked for in one call, each at its own noise level.

    Args:
        options: the model options of the run.
        own: key of our wrappers, which change no result.
    """
    kinds = type(guider), comfy.samplers.CFGGuider
    stock = all(len({getattr(kind, name, None) for kind in kinds}) == 1 for name in METHODS)
    conditions = [one for side in guider.conds.values() for one in side or []]
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return (
        stock
        and not any(options.get(name) for name in FUNCTIONS)
        and not any(one.get(name) is not None for one in conditions for name in CHANGING)
        and all(set(wrappers.get(kind, {})) <= {own} for kind in WRAPPERS)
    )


def host_attention(options: Callable[[], dict]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Gives the host's attention, over q, k, v [B, heads, tokens, D].

    Args:
        options: gives the transformer options of the call that goes on. What stands in for attention there is called
            as the host's networks call it, with heads side by side.

    Several heads of q may share one of k and v, as MAGI-1's do. Torch's, Sage's and Flash's attention take them so; for
    any other, those of k and v are repeated.

    On the processor torch's stands in for the one in parts that the host takes unless it is told another: that asks for
    free memory before every call, and takes twice as long.
    """
    module = comfy.ldm.modules.attention
    known = [getattr(module, f"attention_{name}", None) for name in ("pytorch", "sage", "flash")]
    shares = getattr(module, "TORCH_HAS_GQA", False) and module.optimized_attention in known
    only_16_bit = module.optimized_attention is known[-1]  # Flash's; what stands in for it elsewhere knows no sharing
    unchosen = module.optimized_attention is module.attention_sub_quad and not args.use_quad_cross_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, shared, more, told = q.shape[1], q.shape[1] // k.shape[1], {}, options()
        if unchosen and q.device.type == "cpu" and OVERRIDE not in told:
            return grouped_attention(q, k, v)
        if shared > 1 and shares and OVERRIDE not in told and (q.itemsize == 2 or not only_16_bit):
            more = {"enable_gqa": True}
        elif shared > 1:
            k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        if OVERRIDE in told:
            q, k, v = (part.transpose(1, 2).flatten(2) for part in (q, k, v))
            answer = module.optimized_attention(q, k, v, heads=heads, transformer_options=told)
            return answer.unflatten(-1, (heads, -1)).transpose(1, 2)
        return module.optimized_attention(
            q, k, v, heads, skip_reshape=True, skip_output_reshape=True, transformer_options=told, **more
        )

    return attention


def _rotation_matrices(table: Tensor) -> Tensor:
    """Brings cosines and sines [2, tokens, D / 2] into the host's form, [1, tokens, 1, D / 2, 2, 2]. Tokens come before
    heads: there its kernel copies nothing, and takes no part of a table for the whole."""
    cosine, sine = table
    return torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))[None, :, None]


def _turned_by_host(x: Tensor, table: Tensor) -> Tensor:
    return comfy.ldm.flux.math.apply_rope1(x.transpose(1, 2), table).transpose(1, 2)


# The host's rotary product, one kernel where it has one.
HOST_ROTARY = RotaryProduct(_rotation_matrices, _turned_by_host)


def fitted(backbone, options: dict):
    """Gives a backbone the host's rotary product, which is one kernel on graphics cards, and compiles it where a node
    asks for that; returns it.

    Args:
        options: the transformer options of the run.
    """
    on_processor = comfy.model_management.get_torch_device().type == "cpu"
    backbone.rotary = replace(backbone.rotary, product=IN_TORCH if on_processor else HOST_ROTARY)
    if (compiling := options.get(COMPILE)) is not None:
        backbone.compile(**compiling)
    return backbone


def start_image(options: dict, latent: Tensor) -> Tensor | None:
    """The frames that ARVideoI2V puts on a model, in the host's latent space, or None.

    Args:
        options: of the transformer.
        latent: of the whole video, [B, C, T, H, W].

    Raises:
        UserError: they are of another size.
    """
    given = options.get("ar_config", {}).get("initial_latent")
    if given is not None and (given.ndim != 5 or given.shape[3:] != latent.shape[3:]):
        raise UserError(
            f"The start image of ARVideoI2V is {_size(given)}, the video {_size(latent)}; sample the latent that "
            "ARVideoI2V gives."
        )
    return given


def _size(latent: Tensor) -> str:
    return "{}x{}".format(*pixel_size(latent.shape)) if latent.ndim == 5 else f"of shape {tuple(latent.shape)}"


def compute_dtype(model) -> torch.dtype:
    """What the network computes in, whatever its weights are stored as; ComfyUI 0.3.64 has no method for it."""
    if hasattr(model, "get_dtype_inference"):
        return model.get_dtype_inference()
    return model.manual_cast_dtype or model.get_dtype()


def text_tokens(guider) -> int:
    """Tokens of the longest prompt of a guider."""
    conds = guider.conds or guider.original_conds
    texts = [one.get("cross_attn") for side in conds.values() for one in side or []]
    return max((text.shape[1] for text in texts if text is not None), default=0)


def wan_backbone(network: torch.nn.Module, options: dict, attention) -> Any:
    """What runs a network of the Wan layout, as the transformer options of a run say."""
    kind = family(options.get(FAMILY, "wan"))
    backbone = fitted(kind.backbone(network, options.get(FPS, 24), attention), options)
    backbone.rotary = replace(backbone.rotary, scales=scales(options))
    return backbone


def low_network(model) -> torch.nn.Module | None:
    """The network for low noise levels that a model takes along, if it does."""
    found = model.get_additional_models_with_key(LOW)
    return found[0].model.diffusion_model if found else None


class GuiderGuidance:
    """Puts a forward's steps to the guider, and answers for the network when the guider calls it.

    Args:
        guider: the host's.
        network: the host's, of the Wan layout.
        options: the transformer options of this run.
        captions: of the run.
        ask: calls the guider.
        at_once: whether all of a tick's chunks may be asked for in one call.
        schedule: of the run; a given end is shown what its last chunk is.
        stores: whether chunks leave something in a history.
        plain: whether the guider gives the same weighted sum at every noise level.
        led: workers that have a part of the network, or None.
    """

    def __init__(
        self,
        guider,
        network: torch.nn.Module,
        options: dict,
        captions: ChunkCaptions,
        ask: Ask,
        at_once: bool,
        schedule: ChunkSchedule,
        stores: bool = True,
        plain: bool = False,
        led: Led | None = None,
    ):
        self.guider, self.captions, self.ask, self.at_once, self.led = guider, captions, ask, at_once, led
        self.last_chunk, self.texts_kept = schedule.total_chunks - 1, texts_kept(schedule.max_active)
        self.options, self.stores, self.plain = options, stores, plain
        self._call = local()  # of a thread: the transformer options of its call
        self.attention = host_attention(lambda: getattr(self._call, "options", options))
        self.backbone = self._backbone(network)
        self._elsewhere: dict[torch.nn.Module, Any] = {network: self.backbone}  # backbones, by network
        self._lock = Lock()  # branches that are divided among devices come from several threads
        self._branches: dict[object, str] = {}  # by uuid of the condition
        self.notes = unheeded(network, options)  # for the report
        self._texts: dict[tuple, tuple[Tensor, object]] = {}  # as the network takes them, oldest first
        # Of the call that goes on: what is asked for, who answers, and the branches that were seen.
        self._steps: Sequence[Step] = []
        self._network: Network | None = None
        self._seen: dict[Hashable, None] = {}
        self._called: list[Hashable] = []  # the branches of the guider's call that goes on

    def mix(self, step: Step) -> Hashable:
        """Names the conditions that hold at a step."""
        conditions = self.captions.of(self._chunk(step.place.chunk))
        return tuple(
            (side, number)
            for side, held in conditions.items()
            for number, one in enumerate(held)
            if _holds_at(one, step.sigma)
        )

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Gives all embeddings that a chunk is shown."""
        number = self._chunk(chunk)
        every = (one["uuid"] for held in self.captions.of(number).values() for one in held)
        return [self.captions.text(number, uuid) for uuid in every]

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Asks the guider for steps, in one call where that is allowed."""
        self._network, self._seen = network, {}
        parts = [list(steps)] if self.at_once else [[step] for step in steps]
        values = [velocity for part in parts for velocity in self._asked(part)]
        self._network, self._steps = None, []
        return values, tuple(sorted(self._seen, key=str))

    def _asked(self, steps: list[Step]) -> Sequence[Tensor]:
        self._steps, self._called = steps, []
        self.guider.conds = self.captions.of(self._chunk(steps[0].place.chunk))
        x = joined([step.x for step in steps], dim=2)
        if self.at_once:
            # The guider knows one noise level a call. Where its sum is plain, that may be any: at 1 the clean estimate
            # is x minus the velocity.
            level = 1.0 if self.plain else _level_of(steps)
            return ((x - self.ask(x, level)) / level).split([step.x.shape[2] for step in steps], dim=2)
        (step,) = steps
        clean = self.ask(x, step.sigma)
        return [(x - clean) / step.sigma if step.sigma else torch.zeros_like(x)]

    def answer(self, network: torch.nn.Module, x: Tensor, context: Tensor, options: dict) -> Tensor:
        """Stands in for the network's own forward, for the branches of this call.

        Args:
            network: the host's; hooks may swap it, and each of several GPUs has its own.
            x: [branches * B, C, T, H, W], the steps' chunks behind one another.
            context: embeddings of the first chunk's prompts.
        """
        if self._network is None:
            raise RuntimeError("The network is asked for outside of a step.")
        if context is None or context.shape[-1] != network.text_dim:
            found = "missing" if context is None else f"{context.shape[-1]} wide"
            raise UserError(
                f"A prompt's embedding is {found}, and this model reads {network.text_dim}; use the text encoder of "
                f"its family (Demo Prompt for the demo model)."
            )
        self._call.options = options
        with self._lock:
            backbone = self._backbone_of(network, options)
            names, uuids = self._names(options), options["uuids"]
            first = not all(isinstance(name, Again) for name in names)
            if not first and all(step.place.is_clean_pass for step in self._steps):
                return torch.zeros_like(x)  # such a pass is for the history, where this call leaves nothing
            self._seen |= dict.fromkeys(names)
            self._called += names
        x = x[:, : backbone.channels]  # an image that the host has put behind it is the scene's here
        patched = backbone.high if isinstance(backbone, ExpertsBackbone) else backbone
        patched.patches = ModelPatches.of(network, options, (x.shape[3], x.shape[4]), self.stores and first)
        if leads(network) and patched.patches is not None and patched.patches.on_blocks:
            raise UserError("LongVie 2 takes no patches of its blocks by other nodes; remove that node.")
        if patched is not backbone and patched.patches is not None:
            raise UserError("Two networks take no patches of their blocks or attention by other nodes; remove those.")
        if self.led is not None and patched.patches is not None:
            refuse(["patches of its blocks or its attention"])
        rows = x.shape[0] // len(names)

        def texts(chunk: int | Given) -> list[Tensor]:
            with self._lock:
                return [self._text(self._chunk(chunk), uuid, rows, x) for uuid in uuids]

        parts = x.split([step.x.shape[2] for step in self._steps], dim=2)
        steps = [step._replace(x=part) for step, part in zip(self._steps, parts, strict=True)]
        return joined(self._network(steps, names, texts, backbone), dim=2)

    def _backbone(self, network: torch.nn.Module) -> Any:
        whole = wan_backbone(network, self.options, self.attention)
        low = low_network(self.guider.model_patcher)
        if low is not None:
            if self.led is not None:
                raise UserError("FlowCache over GPUs does not divide two networks; bypass that node.")
            other = wan_backbone(low, self.options, self.attention)
            return ExpertsBackbone(whole, other, self.options[BOUNDARY])
        return whole if self.led is None else self.led.backbone(whole)

    def _backbone_of(self, network: torch.nn.Module, options: dict) -> Any:
        """The backbone that runs a call: of the device that its branches are on, or the run's own, over the network
        that hooks may have put in place of its own."""
        if isinstance(self.backbone, ExpertsBackbone):
            if DEVICE in options:
                raise UserError("Two networks are not divided among GPUs; remove the node that divides guidance.")
            self.backbone.high.network = network
            return self.backbone
        if DEVICE not in options:
            self.backbone.network = network
            return self.backbone
        if network not in self._elsewhere:
            share_frame_rate(self.backbone.network, network)
            self._elsewhere[network] = self._backbone(network)
        return self._elsewhere[network]

    def _text(self, chunk: int, uuid, rows: int, x: Tensor) -> Tensor:
        name, held = self.captions.shown(chunk, uuid)
        key = (name, rows, x.dtype, x.device)
        if key not in self._texts:
            text = self.captions.text(chunk, uuid).to(x.device, x.dtype)
            while len(self._texts) >= self.texts_kept * len(self._branches):
                del self._texts[next(iter(self._texts))]
            self._texts[key] = text if text.shape[0] == rows else text[:1].expand(rows, -1, -1), held
        return self._texts[key][0]

    def _names(self, options: dict) -> list[Hashable]:
        """A name for each branch of a call, which outlives the run: its side of guidance, and its number there. A
        branch that was there already at this step has the name of a further call."""
        found: list[Hashable] = []
        for side, uuid in zip(options["cond_or_uncond"], options["uuids"], strict=True):
            if uuid not in self._branches:
                self._number(side, uuid)
            name: Hashable = self._branches[uuid]
            calls = sum(getattr(one, "branch", one) == name for one in [*self._called, *found])
            found.append(Again(name, calls) if calls else name)
        return found

    def _number(self, side: int, uuid) -> None:
        """Names a condition and those beside it, in the order that the host asks for them on one device: the last one
        first. Of several devices any may be the first to ask."""
        sides = ([one["uuid"] for one in held or []] for held in self.guider.conds.values())
        for one in next((beside[::-1] for beside in sides if uuid in beside), [uuid]):
            if one not in self._branches:
                number = sum(name.startswith(f"{side}.") for name in self._branches.values())
                self._branches[one] = f"{side}.{number}"

    def _chunk(self, chunk: int | Given) -> int:
        """The chunk whose prompts are shown to given frames too."""
        if isinstance(chunk, Given):
            return self.last_chunk if chunk is Given.END else 0
        return chunk


def _level_of(steps: Sequence[Step]) -> float:
    """The noise level that a guider is told for a window: that of its newest chunk that is being denoised."""
    return next((step.sigma for step in reversed(steps) if not step.place.is_clean_pass), 1.0)


def _holds_at(condition: dict, sigma: float) -> bool:
    start, end = condition.get("timestep_start"), condition.get("timestep_end")
    return (start is None or sigma <= start) and (end is None or sigma >= end)
