"""What a report says of a run."""

import pytest

from flowcache_core.report import Report
from flowcache_core.schedule import ChunkSchedule


def test_what_was_saved_against_plain_is_said():
    """Of four steps one was recomputed and a clean pass run, in two seconds; a plain run takes five forwards."""
    report = Report(ChunkSchedule(1, 4, 4), "settings", seconds=2.5, forward_seconds=2.0, clean_passes=1)
    report.decisions = {0: {0: [True, False, False, False]}}
    assert (report.forwards_executed, report.forwards_total) == (2, 5)
    assert report.fewer == pytest.approx(2.5) and report.saved == pytest.approx(3.0)
    assert "about 3.0 s saved against plain" in report.text() and "2.5x fewer" in report.text()
    report.decisions = {0: {0: [True] * 4}}
    assert report.saved == 0.0 and "saved" not in report.text()
