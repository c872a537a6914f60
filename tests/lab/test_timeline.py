"""Who waits for whom while chunks are decoded."""

import pytest

from flowcache_core.lab.timeline import late


@pytest.mark.parametrize("decode", [0.1, 0.9, 2.9])
def test_a_decode_beside_the_run_delays_nothing(decode):
    """Ten ticks of 0.3 s, and a decode that is shorter than they are together."""
    assert late(0.3, 10, decode, "in order") == pytest.approx(decode)
    assert late(0.3, 10, decode, "host waits") == pytest.approx(max(0, decode - 0.3))  # a tick is under way already
    assert late(0.3, 10, decode, "beside") == pytest.approx(0)


def test_a_decode_that_takes_longer_than_a_chunk_sets_the_pace():
    assert late(0.3, 10, 4.0, "beside") == pytest.approx(1.0, abs=0.1)
