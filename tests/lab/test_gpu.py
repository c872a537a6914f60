"""The script for a card, gone through on the processor with tiny models; what it makes of what it finds."""

import json
import sys

import pytest

from flowcache_core.lab import gpu, gpu_checks, stock
from flowcache_core.lab.gpu_page import page

TIMING = {
    "model": "a model", "forward": 0.1, "tick": 0.1, "cut": 0.01, "chunk": 1.0, "passes": 4, "peak": 2**30,
    "planned": 1.1 * 2**30, "busy": 0.9, "launches": 1200, "counted": 1156,
}  # fmt: skip
REPORT = {
    "machine": {"card": "a card", "card_gib": 80.0, "cuda": "13.0", "torch": "2.11", "python": "3.12"},
    "toy": False,
    "parts": {
        "correct": {"found": [{"name": "the same again", "found": "differs", "holds": False}], "error": None},
        "fast: a model": {
            "found": [
                TIMING | {"setting": "plain, budget", "stock": 0.125},
                TIMING | {"setting": "plain, budget, compiled", "forward": 0.08, "cut": 0.03},
            ],
            "error": "RuntimeError: no",
        },
        "whole run": {
            "found": [
                {"model": "a model", "preset": "balanced", "seconds": 10.0, "forwards": 50, "ticks": 70, "of": 70},
                {"model": "a model", "preset": "plain", "seconds": 40.0, "forwards": 250, "ticks": 70, "of": 70},
            ],
            "error": None,
        },
    },
}  # fmt: skip


def test_the_whole_script_runs_on_a_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--toy", "--out", str(tmp_path), "--minutes", "0.2"])
    monkeypatch.setattr(stock, "HOST", tmp_path)  # tests/host/test_stock.py has one
    assert gpu.main() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["parts"]) == [
        "correct", "fast: toy causal", "fast: toy SkyReels-V2", "whole run", "fast: toy MAGI-1"
    ]  # fmt: skip
    assert all(part["found"] and part["error"] is None for part in report["parts"].values())
    assert all(one["forward"] > 0 for name, part in report["parts"].items() if "fast" in name for one in part["found"])
    assert (tmp_path / "report.md").read_text() == page(report)


def test_the_goldens_run_where_the_script_says(monkeypatch):
    (check,) = gpu_checks.goldens(gpu.torch.device("cpu"), 120.0, gpu_checks.GOLDENS[-1:])
    assert check.holds and "2 passed" in check.found
    monkeypatch.setattr(gpu_checks, "GOLDENS", ("tests/engine/test_golden_causal.py::test_of_another_name",))
    (check,) = gpu_checks.goldens(gpu.torch.device("cpu"), 120.0, gpu_checks.GOLDENS)
    assert not check.holds


def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA card is here" in capsys.readouterr().err


def test_the_page_says_what_is_wanted_and_what_was_reached():
    words = page(REPORT)
    assert "| the same again | differs | **no** |" in words
    assert "A cut takes 3.0% of its chunk at most (wanted: 2%)" in words
    assert "ComfyUI's own forward takes 125.0 ms: a plain one of ours 0.80x (wanted: 1.00x)" in words
    assert "Compiled a forward takes 0.80 of its time (wanted: 0.85)" in words
    assert "Planned memory is off by +10% at most (wanted: 5%)" in words
    assert "4.00x faster by the clock (wanted: 6x), 5.00x fewer forwards: 80% of that ratio" in words
    assert "- fast: a model: RuntimeError: no" in words
