"""SkyReels-V2 diffusion forcing: the Wan layout, told whole time-steps and a frame rate.

Source: SkyReels-V2, skyreels_v2_infer/modules/transformer.py; the signal and its polynomials: FlowCache for
SkyReels-V2, skyreels_v2_infer/modules/transformer_flowcache.py (there from TeaCache's fit).
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wan import Attention, WholeStepsBackbone

# Fitted by others: from the relative change of the modulation to that of the output, highest power first.
POLYNOMIAL_1_3B = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -4.99875664e-2)
POLYNOMIAL_14B = (-3.03318725e5, 4.90537029e4, -2.65530556e3, 58.7365115, -0.315583525)


FRAME_RATE = ("fps_embedding", "fps_projection")  # layers of SkyReels-V2 1.3B


class SkyReelsBackbone(WholeStepsBackbone):
    """Runs chunks through a SkyReels-V2 network.

    Args:
        network: a `WanNetwork`, or the host's WanModel; with `fps_embedding` and `fps_projection` where the checkpoint
            has them (the 1.3B).
        fps: frames a second that the video is made for; the network knows 16 and everything else.
        attention: as for `WanBackbone`.
    """

    def __init__(self, network: nn.Module, fps: int = 24, attention: Attention = F.scaled_dot_product_attention):
        super().__init__(network, attention)
        self.fps = fps

    def reuse_signal(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gives what FlowCache watches here: the blocks' modulation, [B, T or 1, 6, dim]. The latent plays no part."""
        return self._time(sigma, x.dtype)[1]

    def _time(self, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedding, modulation = super()._time(sigma, dtype)
        if hasattr(self.network, "fps_embedding"):
            rate = torch.full((1,), 0 if self.fps == 16 else 1, device=sigma.device)
            rate = self.network.fps_projection(self.network.fps_embedding(rate).to(dtype))
            modulation = modulation + rate.unflatten(-1, (6, self.dim))  # of the blocks, not of the head
        return embedding, modulation


def add_frame_rate(network: Any, weights: dict[str, Tensor], layers=nn) -> None:
    """Gives a host's WanModel the frame-rate layers that it drops from a SkyReels-V2 checkpoint.

    Args:
        network: gets `fps_embedding` and `fps_projection`.
        weights: the checkpoint's, under Wan 2.1's names; without frame-rate layers nothing is added.
        layers: whose Embedding and Linear to use; the host's own, so that its weight casting works.
    """
    if "fps_embedding.weight" not in weights:
        return
    rates, dim = weights["fps_embedding.weight"].shape
    head = network.head.head.weight
    packed = not head.dtype.is_floating_point  # as GGUF's quantised layers are
    like = {"device": head.device, "dtype": torch.float32 if packed else head.dtype}
    embedding = layers.Embedding(rates, dim, **like)
    projection = nn.Sequential(layers.Linear(dim, dim, **like), nn.SiLU(), layers.Linear(dim, 6 * dim, **like))
    for name, module in zip(FRAME_RATE, (embedding, projection), strict=True):
        start = f"{name}."
        module.load_state_dict({key.removeprefix(start): w for key, w in weights.items() if key.startswith(start)})
        setattr(network, name, module.requires_grad_(False))


def share_frame_rate(network: Any, other: Any) -> None:
    """Gives another copy of a network, on another device, the frame-rate layers that it lacks."""
    for name in FRAME_RATE:
        if hasattr(network, name) and not hasattr(other, name):
            setattr(other, name, deepcopy(getattr(network, name)).to(other.head.head.weight.device))
