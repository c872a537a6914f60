"""Fixtures of the engine tests."""

import os

import pytest
import torch

from flowcache_core.models.wan import WanBackbone
from tests.helpers.tiny import tiny_network

torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in ComfyUI and other processes that tests start too


@pytest.fixture
def backbone() -> WanBackbone:
    return WanBackbone(tiny_network())
