"""Small networks that the engine tests run on."""

import torch

from flowcache_core.models.wan import WanConfig, WanNetwork

TINY = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)


def tiny_network(seed: int = 0) -> WanNetwork:
    """A random network whose attention is far from uniform, so that a wrong position or mask shows."""
    return random_network(TINY, seed, 1.5)


def random_network(config: WanConfig, seed: int, spread: float) -> WanNetwork:
    """The same of any sizes; `spread` is what a product makes of numbers of unit variance."""
    torch.manual_seed(seed)
    network = WanNetwork(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=spread * parameter[0].numel() ** -0.5)
            if "norm_q" in name or "norm_k" in name:
                parameter.fill_(1.5)
    return network.eval().requires_grad_(False)


def watch_positions(backbone) -> list[int]:
    """Gives the backbone a rotary table that tells which frames it is asked for; returns the list that they go to."""
    seen: list[int] = []

    class Watched(type(backbone.rotary)):
        def axes(self, frames, rows, columns):
            seen.extend(frames.tolist())
            return super().axes(frames, rows, columns)

        def angles(self, positions, width):
            seen.extend(positions.unique().tolist())
            return super().angles(positions, width)

    backbone.rotary = Watched(backbone.rotary.head_dim)
    return seen
