"""Floating-point operations of a run, counted by formula: two for each multiply-add of a matrix product.

Only matrix products count (linear layers, attention, the patch embedding), as in torch.utils.flop_counter.
"""

from ..models.magi.config import MagiConfig
from ..models.wan import WanBackbone, WanConfig
from ..report import Report


def forward_flops(backbone: WanBackbone, tokens: int, seen: int, text: int, frames: int) -> int:
    """Of one forward over one chunk.

    Args:
        tokens: of the chunk.
        seen: tokens that it attends to, itself included.
        text: tokens of the caption.
        frames: noise levels that the time embedding is computed for: 1, or one for each latent frame.
    """
    network, dim = backbone.network, backbone.dim
    ffn = network.blocks[0].ffn[0].out_features
    patch = network.patch_embedding.weight[0].numel()  # channels x patch
    out = network.head.head.out_features
    block = 4 * dim * dim + 2 * seen * dim + 2 * dim * dim + 2 * text * dim + 2 * dim * ffn
    time = frames * (
        network.freq_dim * dim + dim * dim + 6 * dim * dim + network.freq_dim * dim + dim * dim + 6 * dim * dim
    )
    # The head embeds the latent anew and asks for the time embedding again.
    return 2 * (tokens * (backbone.layers * block + 2 * patch * dim + dim * out) + time)


def context_flops(backbone: WanBackbone, text: int) -> int:
    """Of a caption's cross-attention keys and values, made once a run."""
    network, dim = backbone.network, backbone.dim
    width = network.text_embedding[0].in_features
    return 2 * text * (width * dim + dim * dim + backbone.layers * 2 * dim * dim)


def run_flops(backbone: WanBackbone, report: Report, chunk_tokens: int, text: int, clean_pass: bool) -> int:
    """Of a run with the whole history: every recomputed step of a chunk sees all chunks before it and itself."""
    total = context_flops(backbone, text)
    for chunks in report.decisions.values():
        for chunk, steps in chunks.items():
            forwards = sum(steps) + clean_pass
            seen = (chunk + 1) * chunk_tokens
            total += forwards * forward_flops(backbone, chunk_tokens, seen, text, 1)
    return total


def window_flops(
    backbone: WanBackbone, ticks: int, chunks: int, chunk_tokens: int, chunk_frames: int, text: int
) -> int:
    """Of an unaccelerated window: every chunk at every tick, each seeing those before it and itself."""
    tick = sum(
        forward_flops(backbone, chunk_tokens, (chunk + 1) * chunk_tokens, text, chunk_frames) for chunk in range(chunks)
    )
    return ticks * tick + context_flops(backbone, text)


def layer_token_flops(config: WanConfig | MagiConfig, text: int) -> int:
    """Of a token in a layer, attention among the video's tokens apart; embeddings and head, which come once a forward,
    are left out.

    Args:
        text: tokens of the caption.
    """
    if isinstance(config, MagiConfig):
        dim, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        projections = dim * (2 * queries + 2 * keys) + 2 * queries * dim
        ffn = (3 if config.gated else 2) * dim * config.ffn_width
        return 2 * (projections + 2 * text * queries + ffn)
    dim = config.dim
    return 2 * (6 * dim * dim + 2 * text * dim + 2 * dim * config.ffn_dim)


def noted_flops(report: dict, config: WanConfig | MagiConfig, text: int) -> int:
    """Of a run, from what its report counted (`Report.as_dict`)."""
    return report["attention_flops"] + report["layer_tokens"] * layer_token_flops(config, text)
