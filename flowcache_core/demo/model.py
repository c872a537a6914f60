"""Loads the network that ships."""

from pathlib import Path

import torch

from .. import checkpoints
from ..backbones.wan import WanBackbone, WanNetwork
from ..errors import UserError
from . import NETWORK_FILE


def load_network(path: Path | str = NETWORK_FILE) -> WanBackbone:
    """The demo network, or another file of the same family, ready to run in float32.

    Raises:
        UserError: no such file, or not a sound checkpoint of the demo's family.
    """
    info, tensors = checkpoints.load(path, check_finite=True)
    if info.family != "demo":
        raise UserError(f"{Path(path).name} is of the family '{info.family}', expected 'demo': this command has no text encoder.")
    with torch.device("meta"):
        network = WanNetwork(info.config)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return WanBackbone(network.eval().requires_grad_(False))
