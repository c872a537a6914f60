"""Patches of every kind that nodes hang on a model, each of which changes a chunk visibly."""

from collections import OrderedDict
from functools import partial
from types import MethodType

import comfy.samplers
import torch


class Patched:
    """A model with one patch."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "kind": (list(KINDS),)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model, kind: str):
        model = model.clone()
        KINDS[kind](model)
        return (model,)


def attention_output(model) -> None:
    """By how alike a token's query and key are, both as they stand in time and space."""

    def patch(args):
        likeness = (args["q"] * args["k"]).mean(dim=(2, 3))[..., None].tanh()
        return args["x"] * (1 + likeness * (1 + args["transformer_options"]["block_index"]))

    model.set_model_attn1_patch(patch)


def text_output(model) -> None:
    model.set_model_patch(lambda args: args["x"] * 1.1 + 0.1, "attn2_patch")


def skipped_block(model) -> None:
    model.set_model_patch_replace(lambda args, more: args, "dit", "double_block", 1)


def changed_block(model) -> None:
    """Every input that a replacement is given, changed."""

    def patch(args, more):
        assert args["transformer_options"]["block_index"] == 2 and args["transformer_options"]["total_blocks"] == 3
        changed = {"img": args["img"] * 0.9, "txt": args["txt"].flip(1) * 1.2, "vec": args["vec"] * 1.1}
        return {"img": more["original_block"](args | changed)["img"] * 1.1}

    model.set_model_patch_replace(patch, "dit", "double_block", 2)


def attention(model) -> None:
    """In place of the host's attention, self and cross, called as the host's networks call it."""

    def override(plain, q, k, v, heads, *args, transformer_options=None, **kwargs):
        assert q.ndim == 3 and q.shape[-1] == k.shape[-1] and not kwargs.get("skip_reshape")
        weight = 1.5 + 0.2 * transformer_options.get("block_index", 0)
        return plain(q * weight, k, v * 1.1, heads, *args, transformer_options=transformer_options, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override


def forward_of(name: str, model) -> None:
    """An object patch on a module of block 1, as NAG and others do it: its forward, and a little."""
    path = f"diffusion_model.blocks.1.{name}forward" if name != "head." else "diffusion_model.head.forward"
    module = model.get_model_object(path.removesuffix(".forward"))
    plain = type(module).forward

    def forward(self, x, *args, **kwargs):
        return plain(self, x * 1.1, *args, **kwargs) * 1.2

    model.add_object_patch(path, MethodType(forward, module))


def torch_hook(model) -> None:
    model.add_object_patch(
        "diffusion_model.blocks.1._forward_hooks", OrderedDict({1: lambda module, given, out: out * 1.1})
    )


def object_patch(model) -> None:
    """On a network whose modules are other ones."""
    model.add_object_patch("diffusion_model.of_a_test", True)


def later_call(model) -> None:
    """After guidance, each branch once more and as it was: were anything of it else, the result would go astray."""

    def post(args):
        again = [
            comfy.samplers.calc_cond_batch(args["model"], [side], args["input"], args["sigma"], args["model_options"])[
                0
            ]
            for side in (args["uncond"], args["cond"])
        ]
        off = (again[0] - args["uncond_denoised"]) - (again[1] - args["cond_denoised"])
        return args["denoised"] + 30 * off

    model.set_model_sampler_post_cfg_function(post, disable_cfg1_optimization=True)


def whole_forward(model) -> None:
    network = model.get_model_object("diffusion_model")
    plain = type(network).forward_orig
    patch = MethodType(lambda self, *args, **kwargs: 2 * plain(self, *args, **kwargs), network)
    model.add_object_patch("diffusion_model.forward_orig", patch)


def raylight(model) -> None:
    """As Raylight's workers have it, where they are loaded: the blocks' own attention replaced."""

    def usp_self_attn_forward(self, x, freqs, **kwargs):
        return x

    usp_self_attn_forward.__module__ = "raylight.diffusion_models.wan.xdit_context_parallel"
    module = model.get_model_object("diffusion_model.blocks.0.self_attn")
    model.add_object_patch("diffusion_model.blocks.0.self_attn.forward", MethodType(usp_self_attn_forward, module))


def no_place(model) -> None:
    model.set_model_attn1_output_patch(lambda out, options: out)
    model.set_model_attn1_replace(lambda q, k, v, options: torch.zeros_like(q), "middle", 0, 0)


def compute_noise(model) -> None:
    model.set_model_unet_function_wrapper(lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"]))


KINDS = {
    "attn1_patch": attention_output,
    "attn2_patch": text_output,
    "skipped block": skipped_block,
    "changed block": changed_block,
    "attention": attention,
    "block.forward": partial(forward_of, ""),
    "self_attn.forward": partial(forward_of, "self_attn."),
    "cross_attn.forward": partial(forward_of, "cross_attn."),
    "ffn.forward": partial(forward_of, "ffn."),
    "head.forward": partial(forward_of, "head."),
    "torch hook": torch_hook,
    "object patch": object_patch,
    "model function": compute_noise,
    "later call": later_call,
    "whole forward": whole_forward,
    "no place": no_place,
    "Raylight": raylight,
}
