"""ComfyUI's own forward and decode, counted and timed for the lab."""

import torch

from flowcache_core.lab import stock
from flowcache_core.lab.gpu import TOYS
from flowcache_core.lab.real_size import MODELS
from tests.helpers.host.comfy_server import HOST


def test_the_hosts_forward_is_timed_where_ours_is_the_same(monkeypatch):
    monkeypatch.setattr(stock, "HOST", HOST)
    causal, skyreels, magi = TOYS
    seconds = stock.time_stock(causal, torch.device("cpu"), times=3)
    assert seconds and len(seconds) == 3 and min(seconds) > 0
    assert stock.time_stock(skyreels, torch.device("cpu"), times=3) is None
    assert stock.time_stock(magi, torch.device("cpu"), times=3) is None


def test_a_decode_is_counted_at_its_size(monkeypatch):
    """Convolutions over the pixels of a chunk: twice the frames are twice the work, a larger picture in proportion."""
    monkeypatch.setattr(stock, "HOST", HOST)
    models = [model for model in MODELS if model.name in ("Self-Forcing 1.3B", "SkyReels-V2 1.3B")]
    counted = stock.count_stock(models)
    frames = [model.shape[2] * model.shape[3] * model.shape[4] for model in models]
    work = [counted[model].decode.flops for model in models]
    assert work[0] > 1e13 and abs(work[1] / work[0] / (frames[1] / frames[0]) - 1) < 0.1
