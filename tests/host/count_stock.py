"""Counts ComfyUI's own forward of a Wan network, and its Wan VAE's decode of a chunk, without data, for
`flowcache_core.lab.stock`, in the host's Python.

Reads cases from the standard input and writes what it counted to the standard output, both as JSON. A causal model goes
on from a cache of earlier chunks; any other one sees the chunk alone. Attention, except over the text, is left out. A
decode goes on from the frames before.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

HOST, CASES = Path(sys.argv[1]), json.load(sys.stdin)
sys.path[:0] = [str(HOST), str(Path(__file__).resolve().parents[2])]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True  # nothing is computed, and there may be no GPU

import comfy.ldm.wan.ar_model as causal  # noqa: E402
import comfy.ldm.wan.model as plain  # noqa: E402
import comfy.ldm.wan.vae as vae  # noqa: E402
import comfy.ldm.wan.vae2_2 as deep_vae  # noqa: E402
import torch  # noqa: E402
from stock_forward import forward_of  # noqa: E402

from flowcache_core.lab.meter import Meter  # noqa: E402

WHERE = {"device": "meta", "dtype": torch.bfloat16}


def attention_of(meter: Meter, text_tokens: int) -> Callable:
    """In the place of the host's: the same layouts, one launch, counted apart where it is not over the text."""

    def attention(q, k, v, heads, *what, **more):
        parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v)]
        with meter.part("text" if k.shape[1] == text_tokens else "attention"):
            answer = meter.attention(*parts)
        return answer.transpose(1, 2).flatten(2)

    return attention


@torch.inference_mode()
def count(case: dict, layers: int) -> list:
    meter = Meter()
    for module in (plain, causal):
        module.optimized_attention = attention_of(meter, case["text_tokens"])
    forward = forward_of(case, layers, "meta")
    for _ in range(2):  # the text's keys and values are made the first time
        meter.take()
        with meter:
            forward()
    counted = meter.take()
    return (counted[""] + counted["text"]).to_list()


@torch.inference_mode()
def count_decode(shape: list[int]) -> list:
    deep, sizes = shape[1] == 48, {"temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        made = deep_vae.WanVAE(dim=160, z_dim=48, **sizes) if deep else vae.WanVAE(dim=96, z_dim=16, **sizes)
        network = made.to(torch.bfloat16)
    pairs = hasattr(vae, "count_cache_layers") and not deep
    keeping = deep_vae.count_conv3d if deep else vae.count_cache_layers if pairs else vae.count_conv3d
    cache = [None] * keeping(network.decoder)
    meter, latent = Meter(), torch.empty(1, *shape[1:], **WHERE)

    def attention(*pixels):  # [B, C, H, W] each, as on a device with fused attention
        q, k, v = (each.flatten(2).transpose(1, 2)[:, None] for each in pixels)
        return meter.attention(q, k, v)[:, 0].transpose(1, 2).reshape(pixels[0].shape)

    for module in network.modules():
        if hasattr(module, "optimized_attention"):
            module.optimized_attention = attention

    def decode(frames: int) -> None:
        first = {"first_chunk": cache[0] is None} if deep else {}
        network.decoder(network.conv2(latent[:, :, :frames]), feat_cache=cache, feat_idx=[0], **first)

    at_once = 2 if pairs else 1
    for _ in range(3):  # until every layer keeps frames of before
        decode(1)
    counted = []
    for frames in (1, at_once):
        meter.take()
        with meter:
            decode(frames)
        counted.append(meter.take()[""])
    whole, rest = divmod(shape[2], at_once)
    return (counted[1] * whole + counted[0] * rest).to_list()


json.dump(
    {
        "forwards": [[count(case, layers) for layers in (1, 2)] for case in CASES],
        "decodes": [count_decode(case["shape"]) for case in CASES],
    },
    sys.stdout,
)
