"""Runs in the host's Python: `run_kernels.py host pack` hands the host's kernels what our forwards do.

Prints, as JSON, how far the host's rotary product is from ours and what it was handed; how many key heads each
attention got; which linear layers got inputs that the host's fp8 product takes, in its own forward and in ours; what
becomes of the host's network when nodes ask for a compiled one.
"""

import json
from functools import partial

from in_host import of_pack

import comfy.cli_args as cli_args  # isort: skip
import comfy.ldm.flux.math as rope  # isort: skip
import comfy.ldm.modules.attention as attention  # isort: skip
import comfy.ldm.wan.model  # isort: skip
import comfy.ops  # isort: skip
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters

checks = of_pack("nodes.comfyui.checks")
guider = of_pack("nodes.comfyui.guider")
positions = of_pack("flowcache_core.history.positions")
wan = of_pack("flowcache_core.models.wan")
rotary = of_pack("flowcache_core.models.rotary")


def turned(dtype: torch.dtype) -> dict:
    """One rotary product of tokens as a projection gives them."""
    handed, product = [], rope.apply_rope1

    def spy(x, table):
        handed.append([x.is_contiguous(), x.shape[1] == table.shape[1]])
        return product(x, table)

    table = rotary.Rotary(32).table(torch.arange(3), 4, 5)
    x = torch.randn(2, 60, 4 * 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    heads = x.unflatten(-1, (4, 32)).transpose(1, 2)
    rope.apply_rope1 = spy
    try:
        host = guider.HOST_ROTARY.turn(heads, guider.HOST_ROTARY.table(table))
    finally:
        rope.apply_rope1 = product
    ours = positions.rotate(heads, table)
    apart = (host.float() - ours.float()).abs().max().item() / ours.float().abs().max().item()
    return {"apart": apart, "handed": handed, "same type": host.dtype == ours.dtype}


def shared_heads() -> dict:
    """Key heads that each attention gets where two queries' heads share one, and how far the result is off."""
    found = {}
    q, k, v = (torch.randn(1, heads, 6, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    usual = attention.optimized_attention
    names = [name for name in ("attention_pytorch", "attention_sage", "attention_sub_quad") if hasattr(attention, name)]
    for case in [*names, "chosen"]:
        cli_args.args.use_quad_cross_attention = case == "chosen"
        name = "attention_sub_quad" if case == "chosen" else case
        real, got = getattr(attention, name), []

        def spy(q, k, v, heads, got=got, **more):
            got.append(k.shape[1])
            sharing = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
            return F.scaled_dot_product_attention(q, k, v, **sharing)

        setattr(attention, name, spy)
        attention.optimized_attention = spy
        try:
            answer = guider.host_attention(dict)(q, k, v)
        finally:
            setattr(attention, name, real)
            attention.optimized_attention = usual
        found[case] = [got, (answer - expected).abs().max().item()]
    return found


def network(operations, layers: int, dtype: torch.dtype = torch.float32):
    """A tiny network of the host's, with seeded weights."""
    torch.manual_seed(0)
    model = comfy.ldm.wan.model.WanModel(
        dim=64, ffn_dim=96, num_heads=2, num_layers=layers, text_dim=24, operations=operations, device="cpu",
        dtype=dtype,
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def inputs(frames: int = 2) -> tuple:
    return torch.randn(1, 16, frames, 4, 6), torch.randn(1, 5, 24), torch.tensor([0.5])


def attend(backbone, frames: int = 2):
    """Attention of a chunk to itself."""
    table = backbone.rotary.table(torch.arange(frames), 2, 3)

    def attended(layer, q, k, v):
        return F.scaled_dot_product_attention(positions.rotate(q, table), positions.rotate(k, table), v)

    return attended


def velocity(backbone, x, text, sigma) -> torch.Tensor:
    """Of a chunk that sees itself alone."""
    residual = backbone.trunk(x, sigma, backbone.context(text), attend(backbone, x.shape[2]))
    return backbone.head(x, sigma, residual)


def layers_for_fp8() -> dict:
    """Linear layers whose inputs have two or three dimensions, which the host's fp8 product takes."""
    seen = {}

    class Operations(comfy.ops.disable_weight_init):
        class Linear(comfy.ops.disable_weight_init.Linear):
            def forward(self, x):
                seen[self] = x.ndim in (2, 3)
                return super().forward(x)

    model = network(Operations, layers=1)
    names = {layer: name for name, layer in model.named_modules()}
    x, text, sigma = inputs()

    def taken(forward) -> list[str]:
        seen.clear()
        with torch.inference_mode():
            forward()
        return sorted(names[layer] for layer, fits in seen.items() if fits)

    backbone = wan.WanBackbone(model)
    return {
        "stock": taken(partial(model, x, 1000 * sigma, text)),
        "ours": taken(partial(velocity, backbone, x, text, sigma)),
    }


def compiled() -> dict:
    """Graphs, breaks and difference of a network whose blocks a node has had compiled, for each kind of the host's
    layers; what one of another chunk length adds, and what later ones do."""
    found = {}
    for name, operations in (("plain", comfy.ops.disable_weight_init), ("casting", comfy.ops.manual_cast)):
        torch._dynamo.reset()
        counters.clear()
        model = network(operations, layers=3, dtype=torch.float32 if name == "plain" else torch.bfloat16)
        plain, backbone = wan.WanBackbone(model), wan.WanBackbone(model)
        guider.fitted(plain, {})
        guider.fitted(backbone, {checks.COMPILE: {"backend": "eager", "fullgraph": False}})
        graphs, apart = [], 0.0
        with torch.inference_mode():
            for frames in (2, 2, 3, 4):
                asked = inputs(frames)
                apart = max(apart, (velocity(backbone, *asked) - velocity(plain, *asked)).abs().max().item())
                graphs.append(counters["stats"]["unique_graphs"])
        found[name] = {"graphs": graphs, "breaks": list(counters["graph_break"]), "apart": apart}
    return found


def wanted(backend: str, mode: str | None) -> list:
    """How a run compiles where a node asks for a backend and mode, and what the report says."""
    wrapper = {"apply_model": {checks.COMPILED: [print]}}
    asked = {"backend": backend, "options": None, "mode": mode, "fullgraph": False, "dynamic": None}
    options = {"transformer_options": {"wrappers": wrapper}, checks.COMPILE_OPTIONS: asked}
    notes = checks.adapt_others(options)
    taken = options["transformer_options"][checks.COMPILE]
    return [taken["backend"], taken.get("mode"), len(notes), len(wrapper["apply_model"])]


result = {
    "compiled": compiled(),
    "wanted": [wanted(*asked) for asked in (("inductor", None), ("cudagraphs", None), ("inductor", "reduce-overhead"))],
    "float32": turned(torch.float32),
    "bfloat16": turned(torch.bfloat16),
    "heads": shared_heads(),
    "shares": hasattr(attention, "TORCH_HAS_GQA"),
    "layers": layers_for_fp8(),
}
print("RESULT " + json.dumps(result))
