"""Fixtures of the engine tests."""

import pytest

from flowcache_core.models.wan import WanBackbone
from tests.helpers.tiny import tiny_network


@pytest.fixture
def backbone() -> WanBackbone:
    return WanBackbone(tiny_network())
