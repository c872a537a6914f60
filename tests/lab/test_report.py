"""The report's table and plots, and the README's part that is written from it."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.lab import charts
from flowcache_core.lab.bench import finite
from flowcache_core.lab.table import BEGIN, END, insert, table

POINT = {
    "schedule": "magi", "method": "ours", "setting": "9 steps", "speedup": 6.5, "forwards_executed": 160, "psnr": 38.25,
    "ssim": 0.9871, "psnr_vae": 36.0, "psnr_converged": None, "detector": 0.9, "overhead": 0.012, "timed": "pairs",
    "forwards_total": 1040,
}  # fmt: skip
QUALITY = {"detector": 0.9, "detector_first": 0.95, "detector_last": 0.9}
NAMES = ("whole history", "frames by importance", "sliding window", "random tokens")
REPORT = {
    "machine": {"cores": 2, "processor": "a processor", "torch": "2.13"},
    "size": {"clips": 8, "chunks": 16, "pairs": 5, "converged_clips": 4, "converged_chunks": 6},
    "points": [
        POINT | {"method": "fewer steps, AB2", "speedup": 7.0},
        POINT,
        POINT | {"method": "plain", "psnr": None},
    ],
    "checks": {},
    "left_out": [],
    "short_history": {
        "budget": 3, "chunks": 64,
        "rows": [
            {"name": name, "history_bytes": 2**20, "quality": QUALITY, "likeness": {"psnr": 30.0 - place}}
            for place, name in enumerate(NAMES)
        ],
    },
    "long_run": {
        "chunks": 1000, "settings": "magi", "last_100_over_50_to_150": 1.01, "rss_growth_after_chunk_50": 0.002,
        "history_bytes": [2**20, 3 * 2**20],
    },
    "compression": {
        "share_of_run": 0.012, "tokens": 8192, "seconds": 0.1, "seconds_direct": 0.9, "bytes": 10, "bytes_direct": 400,
        "same": 0.9999,
    },
}  # fmt: skip


def test_the_table_says_what_was_measured():
    words = table(REPORT)
    assert "| ours | 9 steps | 6.5x | 160 | 38.2 | 0.987 | 36.0 |  | 90% | 1.2% |" in words
    lines = [line for line in words.splitlines() if "steps |" in line]
    assert [line.split(" | ")[0] for line in lines] == [
        "| plain",
        "| ours",
        "| fewer steps, AB2",
    ]  # plain and ours first
    assert "1.010" in words and "9.0x faster" in words and "1/40" in words and "history at most 3.0 MB" in words


def test_the_readme_keeps_everything_else():
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = insert(readme, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert insert(once, "new") == once
    with pytest.raises(UserError, match="markers"):
        insert("no markers", "new")


def test_plots_are_800_pixels_wide_and_not_empty():
    curves = [charts.Curve(f"method {i}", [(1.5 + i, 45.0 - i), (4.0 + i, 30.0 - i)]) for i in range(11)]
    for picture in (
        charts.likeness_chart("a title", "a subtitle", curves, [(4.0, 42.0)]),
        charts.long_run_chart([0.1, 0.2] * 300, [2**20] * 600, [2**28] * 600),
    ):
        assert picture.width == 800 and 300 < picture.height < 900
        assert len(picture.getcolors(2**20)) > 50


def test_what_has_no_word_in_json_is_null():
    assert finite({"a": [float("nan"), 1.5, (float("inf"), "x")], "b": {"c": 2}}) == {
        "a": [None, 1.5, [None, "x"]],
        "b": {"c": 2},
    }
