"""What our code costs over MAGI-1's bare arithmetic, on this machine: `python -m flowcache_core.lab.magi_speed`.

Two ratios, on a random network with the 4.5B's proportions. A forward: the backbone over its history, against the same
sums written down once without modules, histories or options. A run: its whole time against the sum of its forwards.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.forward import Step
from ..engine.layers import run_layers
from ..history.cache import History
from ..history.positions import Positions, rotate
from ..models.magi.config import MagiConfig
from ..models.magi.forward import MagiSampling, magi_engine, magi_plan, magi_schedule
from ..models.magi.network import MagiBackbone, MagiContext, MagiNetwork, grouped_attention
from ..models.magi.sampling import CHUNK_FRAMES
from ..models.magi.text import null_text
from ..schedule import Place
from ..settings import OFF

CONFIG = MagiConfig(layers=4, width=768, ffn_width=3072, heads=6, kv_heads=2)
SHAPE = (1, 16, CHUNK_FRAMES, 24, 24)
PAST = 3  # chunks that a forward looks back on
MOST_FORWARD, MOST_RUN = 1.10, 1.05  # what we allow ourselves


def random_backbone() -> MagiBackbone:
    torch.manual_seed(0)
    network = MagiNetwork(CONFIG)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return MagiBackbone(network.requires_grad_(False).eval())


def bare_forward(
    backbone: MagiBackbone, x: Tensor, t: float, context: MagiContext, past: list[tuple[Tensor, Tensor]], table: Tensor
) -> Tensor:
    """MAGI-1's arithmetic for one chunk of batch 1 and nothing else; `past` are rotated keys and values a layer."""
    w = dict(backbone.network.named_parameters())
    half = torch.exp(-9.210340371976184 * torch.arange(128) / 128) * 1000.0 * t
    time_vector = F.linear(
        torch.cat([half.cos(), half.sin()])[None], w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]
    )
    time_vector = F.linear(F.silu(time_vector), w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"]) + context.kind
    embedded = F.conv3d(x, w["x_embedder.weight"], stride=(1, 2, 2)).flatten(2).transpose(1, 2)
    h = embedded

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, 128)).transpose(1, 2)

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"] + 1, w[f"{name}.bias"], 1e-6)

    for layer in range(CONFIG.layers):
        block = f"videodit_blocks.layers.{layer}."
        own = block + "self_attention."
        gates = F.linear(
            F.silu(time_vector),
            w[block + "ada_modulate_layer.proj.0.weight"],
            w[block + "ada_modulate_layer.proj.0.bias"],
        )
        first, second = torch.tanh(gates)[:, None].chunk(2, dim=-1)
        name = own + "linear_qkv."
        y = F.layer_norm(h, h.shape[-1:], w[name + "layer_norm.weight"], w[name + "layer_norm.bias"], 1e-6)
        q, qx, k, v = (heads(F.linear(y, w[f"{name}{part}.weight"])) for part in ("q", "qx", "k", "v"))
        q, k = (backbone.rotary.paired(norm(z, f"{own}{part}_layernorm")) for z, part in ((q, "q"), (k, "k")))
        keys, values = past[layer]
        keys[:, :, -k.shape[2] :], values[:, :, -v.shape[2] :] = rotate(k, table), v
        a = grouped_attention(rotate(q, table), keys, values)
        b = grouped_attention(norm(qx, own + "q_layernorm_xattn"), *context.captions[layer][0])
        # Past and caption are interleaved in 8 groups of channels.
        y = torch.stack([z.transpose(1, 2).flatten(2).unflatten(-1, (8, -1)) for z in (a, b)], dim=3).flatten(2)
        h = norm(F.linear(y, w[own + "linear_proj.weight"]) * first, block + "self_attn_post_norm") + h
        name = block + "mlp."
        y = F.layer_norm(h, h.shape[-1:], w[name + "layer_norm.weight"], w[name + "layer_norm.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, w[name + "linear_fc1.weight"])), w[name + "linear_fc2.weight"])
        h = norm(y * second, block + "mlp_post_norm") + h
    out = F.linear(norm(h, "videodit_blocks.final_layernorm"), w["final_linear.linear.weight"])
    frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    out = out.reshape(1, frames, rows, columns, 2, 2, 16).permute(0, 6, 1, 2, 4, 3, 5)
    return -out.reshape(x.shape)


def seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def forward(backbone: MagiBackbone, history: History, step: Step, context: MagiContext) -> Tensor:
    """Runs one chunk over a history, as the engine does."""
    chunk = step.place.chunk

    def attend(layer: int, _: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return history.attend(layer, chunk, q, k, v, grouped_attention)

    stored = [chunk] if step.place.is_clean_pass else []
    (group,) = run_layers(backbone, [step], lambda step: [context], 0, [history], attend, stored)
    return backbone.head(step.x, group.levels, backbone.residual(step.x, group.hidden))


@torch.inference_mode()
def forward_ratio(repeats: int) -> tuple[float, float]:
    """Our forward's time over the bare one's (median of neighbouring pairs), and how far the results lie apart."""
    backbone = random_backbone()
    text = null_text(0.1 * torch.randn(CONFIG.caption_tokens, CONFIG.caption_width))
    context, x = backbone.context(text), torch.randn(SHAPE)
    schedule = magi_schedule(CHUNK_FRAMES, steps=8, given_frames=PAST * CHUNK_FRAMES)
    plan = magi_plan(CONFIG, schedule, OFF, MagiSampling(visible=()), SHAPE, itemsize=4)
    history = History(plan, Positions(plan, backbone.rotary, x.device), OFF.history, torch.float32)
    for chunk in range(PAST):
        forward(backbone, history, Step(torch.randn(SHAPE), 0.4, Place(chunk, None, 0)), context)
        history.commit([chunk])
    step = Step(x, 0.4, Place(PAST, 0, 0))
    ours = partial(forward, backbone, history, step, context)
    ours()
    past = [(layer.keys.here.clone(), layer.values.here.clone()) for layer in history.layers]
    frames = torch.arange(PAST * CHUNK_FRAMES, (PAST + 1) * CHUNK_FRAMES)
    table = backbone.rotary.table(frames, *plan.grid)

    def bare() -> Tensor:
        return bare_forward(backbone, x, 1.0 - 0.4, context, past, table)

    apart = ((ours() - bare()).norm() / bare().norm()).item()
    return statistics.median(seconds(ours) / seconds(bare) for _ in range(repeats)), apart


def run_ratio(chunks: int, steps: int) -> float:
    """A whole run's time over the sum of its forwards'."""
    backbone = random_backbone()
    null = null_text(0.1 * torch.randn(CONFIG.caption_tokens, CONFIG.caption_width))
    schedule = magi_schedule(chunks * CHUNK_FRAMES, steps)
    engine = magi_engine(
        backbone, schedule, OFF, lambda chunk: null, null, lambda chunk: torch.randn(SHAPE),
        shape=SHAPE, device=torch.device("cpu"),
    )  # fmt: skip
    for _ in engine.run():
        pass
    return engine.report.seconds / engine.report.forward_seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flowcache_core.lab.magi_speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=9, help="of a forward (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=3, help="of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a chunk (default: %(default)s)")
    options = parser.parse_args()
    forward, apart = forward_ratio(options.repeats)
    run = run_ratio(options.chunks, options.steps)
    print(f"forward {forward:.3f} x the bare arithmetic (at most {MOST_FORWARD}), results {apart:.1e} apart")
    print(f"run     {run:.3f} x the sum of its forwards (at most {MOST_RUN})")


if __name__ == "__main__":
    main()
