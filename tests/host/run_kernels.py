"""Runs in the host's Python: `run_kernels.py host pack` hands the host's kernels what our forwards do.

Prints, as JSON, how far the host's rotary product is from ours and what it was handed; how many key heads each
attention got; which linear layers got inputs that the host's fp8 product takes, in its own forward and in ours.
"""

import json
from functools import partial

from in_host import of_pack

import comfy.ldm.flux.math as rope  # isort: skip
import comfy.ldm.modules.attention as attention  # isort: skip
import comfy.ldm.wan.model  # isort: skip
import comfy.ops  # isort: skip
import torch
import torch.nn.functional as F

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
    for name in names:
        real, got = getattr(attention, name), []

        def spy(q, k, v, heads, got=got, **more):
            got.append(k.shape[1])
            sharing = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
            return F.scaled_dot_product_attention(q, k, v, **sharing)

        setattr(attention, name, spy)
        attention.optimized_attention = spy
        try:
            answer = guider.host_attention({})(q, k, v)
        finally:
            setattr(attention, name, real)
            attention.optimized_attention = usual
        found[name] = [got, (answer - expected).abs().max().item()]
    return found


def layers_for_fp8() -> dict:
    """Linear layers whose inputs have two or three dimensions, which the host's fp8 product takes."""
    seen = {}

    class Operations(comfy.ops.disable_weight_init):
        class Linear(comfy.ops.disable_weight_init.Linear):
            def forward(self, x):
                seen[self] = x.ndim in (2, 3)
                return super().forward(x)

    torch.manual_seed(0)
    model = comfy.ldm.wan.model.WanModel(
        dim=64, ffn_dim=96, num_heads=2, num_layers=1, text_dim=24, operations=Operations, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    names = {layer: name for name, layer in model.named_modules()}
    x, text, sigma = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, 24), torch.tensor([0.5])

    def taken(forward) -> list[str]:
        seen.clear()
        with torch.inference_mode():
            forward()
        return sorted(names[layer] for layer, fits in seen.items() if fits)

    backbone = wan.WanBackbone(model)
    table = backbone.rotary.table(torch.arange(2), 2, 3)

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(positions.rotate(q, table), positions.rotate(k, table), v)

    def ours():
        residual = backbone.trunk(x, sigma, backbone.context(text), attend)
        backbone.head(x, sigma, residual)

    return {"stock": taken(partial(model, x, 1000 * sigma, text)), "ours": taken(ours)}


result = {
    "float32": turned(torch.float32),
    "bfloat16": turned(torch.bfloat16),
    "heads": shared_heads(),
    "shares": hasattr(attention, "TORCH_HAS_GQA"),
    "layers": layers_for_fp8(),
}
print("RESULT " + json.dumps(result))
