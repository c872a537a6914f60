"""Fixtures of the engine tests."""

import pytest
from tiny import tiny_network

from flowcache_core.models.wan import WanBackbone


@pytest.fixture
def backbone() -> WanBackbone:
    return WanBackbone(tiny_network())
