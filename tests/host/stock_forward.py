"""ComfyUI's own forward of a Wan network with random weights, for the scripts that count and time it in the host's
Python."""

from collections.abc import Callable

import comfy.ldm.wan.ar_model as causal
import comfy.ldm.wan.model as plain
import comfy.ops
import torch


def forward_of(case: dict, layers: int, device: str) -> Callable[[], object]:
    """A call of it. A causal model goes on from a cache of earlier chunks; any other one sees the chunk alone.

    Args:
        case: what `flowcache_core.lab.stock` asks for.
    """
    where = {"device": device, "dtype": torch.bfloat16}
    kind = causal.CausalWanModel if case["causal"] else plain.WanModel
    model = kind(**case["config"], num_layers=layers, operations=comfy.ops.disable_weight_init, **where)
    if device != "meta":
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    x = torch.zeros(case["shape"], **where)
    rows, tokens = x.shape[0], x.shape[2] * -(-x.shape[3] // 2) * -(-x.shape[4] // 2)
    text, times = (
        torch.zeros(rows, case["text_tokens"], case["config"]["text_dim"], **where),
        torch.zeros(rows, device=device),
    )
    options: dict = {}
    if case["causal"]:
        caches = model.init_kv_caches(rows, (case["past"] + 1) * tokens, **where)
        for cache in caches:
            for part in cache.values():
                if isinstance(part, torch.Tensor):
                    part.zero_()
        options["ar_state"] = {
            "start_frame": case["past"] * x.shape[2],
            "kv_caches": caches,
            "crossattn_caches": model.init_crossattn_caches(rows, **where),
        }

    def forward() -> object:
        for cache in options.get("ar_state", {}).get("kv_caches", []):
            cache["end"] = case["past"] * tokens
        return model(x, times, text, transformer_options=options)

    return forward
