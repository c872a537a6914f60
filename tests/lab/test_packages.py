"""Other packages beside FlowCache: the same weights, the same video, and a table that says so."""

import pytest

from flowcache_core.demo import NETWORK_FILE
from flowcache_core.lab.packages import SETUP, table

FOUND = {
    "versions": {"diffusers": "1", "cache-dit": "2"}, "clips": 8, "chunks": 12, "plain_to_plain_psnr": 99.9,
    "rows": [
        {"method": "plain", "setting": "every step", "speedup": 1.0, "seconds": 4.0, "psnr": None, "error": None,
         "st_lpips": None},
        {"method": "cache-dit", "setting": "F1", "speedup": 2.5, "seconds": 1.6, "psnr": 30.04, "error": 1.26,
         "st_lpips": 0.0123},
    ],
}  # fmt: skip


def test_the_table_has_every_setting():
    words = table(FOUND)
    assert "| plain | every step | 1.0x | 4.00 |  | – |" in words
    assert "| cache-dit | F1 | 2.5x | 1.60 | 30.0 ± 1.3 | 0.0123 |" in words and "100 dB alike" in words


def test_both_unaccelerated_runs_are_the_same():
    """diffusers' pipeline over the demo's weights makes the video that this engine makes."""
    pytest.importorskip("diffusers", reason="no diffusers: make bench-peers installs it")
    import torch

    from flowcache_core.demo import load_network
    from flowcache_core.lab.methods import plain
    from flowcache_core.lab.packages import Pipeline
    from flowcache_core.lab.runs import Clips, run
    from flowcache_core.models.skyreels import SkyReelsBackbone

    backbone = SkyReelsBackbone(load_network(NETWORK_FILE).network)
    clip = Clips(backbone, ["a red circle"], 2)
    made = Pipeline(NETWORK_FILE, 2)(clip)
    torch.testing.assert_close(made, run(plain(SETUP), SETUP, clip).latents, rtol=0, atol=1e-3)
