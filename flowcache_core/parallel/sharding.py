"""Weights divided among processes, each layer's put together while it is used: torch's FSDP2.

FSDP2 does that around a module's call. Backbones call the modules inside a block and never the block, so it is told
here when.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def blocks_of(backbone: Any) -> nn.ModuleList:
    """The blocks that a backbone of either layout runs."""
    network = backbone.network
    return network.videodit_blocks.layers if hasattr(network, "videodit_blocks") else network.blocks


def shard(backbone: Any, mesh: DeviceMesh) -> None:
    """Divides the weights of a backbone's blocks, one block at a time, so that each process holds 1/P of each; what is
    outside the blocks, every process has whole.

    Args:
        mesh: the processes, and the kind of their devices.
    """
    blocks = blocks_of(backbone)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    backbone.whole = partial(_whole, blocks)


def bytes_held(backbone: Any) -> int:
    """Counts the bytes of the blocks' weights in this process, between two uses."""
    return sum(
        getattr(weight, "to_local", lambda weight=weight: weight)().nbytes
        for weight in blocks_of(backbone).parameters()
    )


@contextmanager
def _whole(blocks: Any, layer: int) -> Iterator[None]:
    with torch.inference_mode():  # its buffers are made so, whoever asks first
        blocks[layer].unshard()
        try:
            yield
        finally:
            blocks[layer].reshard()
