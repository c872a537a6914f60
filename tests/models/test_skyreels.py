"""SkyReels-V2's frame-rate layers on a network that was made without them."""

import torch

from flowcache_core.models.skyreels import SkyReelsBackbone, add_frame_rate
from flowcache_core.models.wan import WanNetwork
from tests.helpers import golden_weights
from tests.helpers.golden_weights import SMALL, SMALL_FPS
from tests.helpers.magi_weights import normal


def test_frame_rate_is_added():
    weights = golden_weights.network(SMALL_FPS).state_dict()
    bare = WanNetwork(SMALL)
    bare.load_state_dict(weights, strict=False)  # as a host does that does not know these layers
    add_frame_rate(bare, weights)
    whole = SkyReelsBackbone(golden_weights.network(SMALL_FPS), fps=16)
    x, sigma = normal("x", (1, 16, 2, 4, 6)), torch.tensor([0.6])
    assert torch.equal(SkyReelsBackbone(bare, fps=16).reuse_signal(x, sigma), whole.reuse_signal(x, sigma))
    assert not torch.equal(SkyReelsBackbone(bare, fps=24).reuse_signal(x, sigma), whole.reuse_signal(x, sigma))


def test_without_frame_rate_nothing_is_added():
    network = WanNetwork(SMALL)
    add_frame_rate(network, golden_weights.network(SMALL).state_dict())
    assert not hasattr(network, "fps_embedding")
