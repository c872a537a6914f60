"""The report's tables and charts, and the parts of pages that are written from it."""

import io
import json
import re
import sys

import pytest
from PIL import Image

from flowcache_core.errors import UserError
from flowcache_core.lab import charts
from flowcache_core.lab.bench import finite
from flowcache_core.lab.table import BEGIN, END, insert, main, summary, table
from tests.helpers.paths import ROOT

LOOKS = dict.fromkeys(("st_lpips", "vmaf")) | dict.fromkeys(("motion", "jumps", "colour"), {"mean": 1.0})
POINT = {
    "schedule": "magi", "method": "ours", "setting": "9 steps", "speedup": 6.5, "forwards_executed": 160, "psnr": 38.25,
    "ssim": 0.9871, "psnr_vae": 36.0, "psnr_converged": None, "detector": 0.9, "overhead": 0.012, "timed": "pairs",
    "forwards_total": 1040, "psnr_median": 40.5, "psnr_error": 1.26, "forced": 51.0, "forced_median": 50.0,
    "forced_error": 0.5, "looks": LOOKS,
}  # fmt: skip
NOT_MEASURED = dict.fromkeys(("psnr", "psnr_median", "psnr_error", "forced", "forced_median", "forced_error"))
QUALITY = {"detector": 0.9, "detector_first": 0.95, "detector_last": 0.9}
NAMES = ("whole history", "frames by importance", "sliding window", "random tokens")
REPORT = {
    "machine": {"cores": 2, "processor": "a processor", "torch": "2.13"},
    "size": {"clips": 8, "chunks": 16, "pairs": 5, "converged_clips": 4, "converged_chunks": 6},
    "points": [
        POINT | {"method": "fewer steps, AB2", "speedup": 7.0},
        POINT,
        POINT | {"method": "plain"} | NOT_MEASURED,
    ],
    "checks": {"magi": {"bfloat16_floor_psnr": {"setting": "9 steps", "mean": 39.12, "median": 42.0}}},
    "left_out": [],
    "short_history": {
        "budget": 3, "chunks": 64,
        "rows": [
            {"name": name, "bounded": place > 0, "history_bytes": 2**20, "quality": QUALITY,
             "likeness": {"psnr": 30.0 - place}, "looks": LOOKS}
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
    "compiled": {"chunks": 2, "seconds": 4.0, "seconds_compiled": 3.0, "seconds_first": 41.2, "apart": 7e-7},
}  # fmt: skip


def test_the_table_says_what_was_measured():
    words = table(REPORT)
    assert (
        "| ours | 9 steps | 6.5x | 160 | 38.2 ± 1.3 | 40.5 | 51.0 ± 0.5 | 50.0 | 0.987 | 36.0 |  | 90% | 1.2% |"
        in words
    )
    assert "39.1 dB mean and 42.0 median at 9 steps (magi)" in words
    figures = words[words.index("<details>") :]
    lines = [line.split(" | ")[0] for line in figures.splitlines() if "steps |" in line]
    assert lines == 2 * ["| plain", "| ours", "| fewer steps, AB2"]  # plain and ours first; then how they look
    assert "1.010" in words and "9.0x faster" in words and "1/40" in words and "history at most 3.0 MB" in words
    assert "takes 0.75 of its time" in words and "takes 41 s with the compiling" in words


def test_the_summary_has_the_best_of_each_kind_at_equal_speed():
    curves = {
        "ours": [(2.0, 40.0), (8.0, 30.0)],
        "fewer steps, Euler": [(2.0, 20.0), (8.0, 16.0)],
        "fewer steps, UniPC": [(2.0, 30.0), (8.0, 10.0)],
        "EasyCache's rule": [(3.5, 25.0)],
    }
    points = [
        POINT | {"method": method, "speedup": speed, "psnr": level}
        for method, curve in curves.items()
        for speed, level in curve
    ]
    lines = summary(REPORT | {"points": points}).splitlines()
    assert lines[0].startswith("| PSNR in dB | MAGI-1's schedule, 3x | MAGI-1's schedule, 4x |")
    assert lines[2] == "| ours | 37 | 35 | 32 | – | – | – |"  # 4x lies half way, speeds being logarithmic
    assert lines[3] == "| fewer steps, the best solver | 24 | 20 | 17 | – | – | – |"
    assert "| EasyCache's rule | – | – | – | – | – | – |" in lines
    assert "8 captions of 16 chunks" in lines[-1]


def test_a_page_keeps_everything_else():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = insert(page, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert insert(once, "new") == once
    with pytest.raises(UserError, match="markers"):
        insert("no markers", "new")


def test_the_pages_that_ship_take_what_is_made_of_a_report(tmp_path, monkeypatch):
    report, page, readme = tmp_path / "report.json", tmp_path / "page.md", tmp_path / "readme.md"
    report.write_text(json.dumps(REPORT))
    page.write_text((ROOT / "docs/benchmark.md").read_text(encoding="utf-8"), encoding="utf-8")
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["table", *map(str, ("--report", report, "--page", page, "--readme", readme))])
    main()
    assert f"{BEGIN}\n\n{table(REPORT)}\n\n{END}" in page.read_text(encoding="utf-8")
    assert f"{BEGIN}\n\n{summary(REPORT)}\n\n{END}" in readme.read_text(encoding="utf-8")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table(REPORT) + "\n"


def test_the_readme_is_a_front_page():
    """At most 1,500 words, with pictures and pages that exist."""
    words = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(words.split()) <= 1500
    links = [link for link in re.findall(r"\]\(([^)#]+)", words) if not link.startswith("http")]
    assert len(links) > 10 and [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize(("page", "targets"), [("README.md", ["demo"]), ("CONTRIBUTING.md", ["test", "lint"])])
def test_pages_give_the_commands_behind_make(page, targets):
    """For Windows, which has no make."""
    rules = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    words = (ROOT / page).read_text(encoding="utf-8")
    for target in targets:
        for line in rules[target].replace("$(VENV)/bin/", "").splitlines():
            assert f"`{line.strip().partition(' --durations')[0]}`" in words, line


def test_charts_show_every_point():
    reason = "matplotlib, which draws the bench's charts, is not installed (`make test` installs it)"
    pytest.importorskip("matplotlib", reason=reason)
    curves = [charts.Curve(f"method {i}", [(1.5 + i, 75.0 - i), (4.0 + i, 30.0 - i)]) for i in range(11)]
    curves.append(charts.Curve("none", []))
    panels = [charts.Panel("free", curves, [(4.0, 42.0)], floor=39.0), charts.Panel("forced", curves)]
    likeness = charts.likeness_chart("a title", "a subtitle", panels)
    long_run = charts.long_run_chart([0.1, 0.2] * 300, [2**20] * 600, [2**28] * 600)
    for figure in (likeness, long_run):
        file = io.BytesIO()
        figure.savefig(file)
        with Image.open(file) as picture:
            assert picture.width == 1200 and len(picture.convert("RGB").getcolors(2**20)) > 50
    axes, forced = likeness.axes
    names = [f"method {i}" for i in range(11)]
    assert [line.get_label() for line in axes.lines] == [*names, "to be reached", "rounded to bfloat16, by itself"]
    assert [line.get_label() for line in forced.lines] == names and axes.lines[-1].get_ydata() == [39.0, 39.0]
    assert axes.lines[0].get_xydata().tolist() == [[1.5, 60.0], [4.0, 30.0]]  # 60 dB and more are drawn at 60
    assert axes.lines[0].get_zorder() > axes.lines[1].get_zorder()
    ends = [line.get_ydata()[-1] for axes in long_run.axes for line in axes.lines]
    assert ends == pytest.approx([200, 147, 1, 256], 0.05)


def test_what_has_no_word_in_json_is_null():
    assert finite({"a": [float("nan"), 1.5, (float("inf"), "x")], "b": {"c": 2}}) == {
        "a": [None, 1.5, [None, "x"]],
        "b": {"c": 2},
    }
