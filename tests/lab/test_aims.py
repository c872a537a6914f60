"""Aims are read off a report as they are worded: at equal forwards, by the smallest lead, failing where they fail."""

import copy

import pytest

from flowcache_core.lab.aims import aims, at
from flowcache_core.lab.table import table


def point(method, setting, fewer, psnr, converged=None, schedule="magi", timed="batch", overhead=0.01):
    return {
        "schedule": schedule, "method": method, "setting": setting, "speedup": fewer, "psnr": psnr, "ssim": 0.9,
        "psnr_vae": None, "psnr_converged": converged, "detector": 0.9, "overhead": overhead, "timed": timed,
        "forwards_total": 6400, "forwards_executed": round(6400 / fewer), "psnr_median": psnr, "psnr_error": None,
        "forced": None, "forced_median": None, "forced_error": None,
    }  # fmt: skip


def kept(name, detector, psnr):
    quality = {"detector": detector, "detector_first": 0.95, "detector_last": 0.9}
    return {"name": name, "quality": quality, "likeness": psnr and {"psnr": psnr}, "history_bytes": 2**20}


REPORT = {
    "machine": {"cores": 2, "processor": "a processor", "torch": "2.13"},
    "size": {"clips": 8, "chunks": 16, "pairs": 5, "converged_clips": 4, "converged_chunks": 6},
    "points": [
        point("ours", "30 steps", 2.0, 54.0, 50.0, timed="pairs", overhead=0.02),
        point("ours", "15 steps", 4.0, 46.0, 45.0, timed="pairs", overhead=0.035),
        point("ours", "9 steps", 8.0, 38.0, 40.0),
        point("fewer steps, Euler", "16 steps", 4.0, 36.0, 37.0),
        point("fewer steps, AB2", "16 steps", 4.0, 41.0, 45.5),
        point("fewer steps, AB2", "4 steps", 16.0, 60.0, 60.0),  # out of the range
        point("FlowCache's rule", "threshold 0.1", 2.0, 30.0),
        point("FlowCache's rule", "threshold 0.2", 4.0, 40.0),
        point("ours", "3 steps", 1.25, 20.0, schedule="causal", timed="pairs"),
        point("fewer steps", "3 steps", 1.3, 19.0, schedule="causal", timed="pairs"),
    ],
    "checks": {
        "balanced": {
            "setting": "9 steps", "chunks": 16, "predicted_psnr": 38.5, "psnr": 40.0, "standard_error": 1.25,
        },
    },
    "left_out": ["magi: periodic, held, every 4th"],
    "long_run": {
        "chunks": 1000, "settings": "magi", "last_100_over_50_to_150": 1.04, "rss_growth_after_chunk_50": 0.002,
        "history_bytes": [2**20],
    },
    "short_history": {
        "budget": 3, "chunks": 64,
        "rows": [
            kept("whole history", 0.95, None),
            kept("frames by importance", 0.945, 30.0),
            kept("sliding window", 0.9, 31.0),
            kept("random tokens", 0.9, 25.0),
        ],
    },
    "compression": {
        "share_of_run": 0.012, "tokens": 8192, "seconds": 0.1, "seconds_direct": 0.9, "bytes": 10, "bytes_direct": 90,
        "same": 0.9999,
    },
}  # fmt: skip


def told(report):
    return {aim.name: (aim.reached, aim.holds) for aim in aims(report)}


def test_a_curve_is_read_between_its_points_alone():
    curve = [(2.0, 50.0), (8.0, 30.0)]
    assert at(curve, 4.0) == pytest.approx(40.0)
    assert (at(curve, 2.0), at(curve, 8.0), at(curve, 1.9), at(curve, 8.1)) == (50.0, 30.0, None, None)


def test_every_aim_says_what_was_reached():
    found = told(REPORT)
    assert found["magi: likeness at 4x by time"] == ("46.00 dB", True)
    assert found["magi: likeness at 10x by time"] == ("8.0x is the fastest", False)
    assert found["skyreels: likeness at 8x by time"] == ("", None)
    between = "at equal forwards, 2x to 8x"
    assert found[f"magi: lead on the best solver of fewer steps, {between}"] == ("+5.0 dB", True)
    assert found["magi: the same, likeness to the converged run"] == ("-0.5 dB", False)
    assert found["magi: lead on FlowCache's rule at equal forwards, 2x to 6x"] == ("+6.0 dB", False)
    assert found["magi: lead on TeaCache's rule at equal forwards, 2x to 6x"] == ("", None)
    assert found["magi: overhead (the worst: 15 steps)"] == ("3.5%", False)
    assert found["causal: against plain with as many steps fewer, likeness"] == ("+1.0 dB", True)
    assert found["causal: against plain with as many steps fewer, speed"] == ("0.96x", False)
    assert found["quality balanced: off its prediction (38.5 dB; 40.0 ± 1.2 measured)"] == ("1.50 dB", True)
    assert found["1,000 chunks: time of the last 100 over chunks 50 to 150"] == ("1.040x", False)
    history = "history of 3 clean chunks, 64 chunks long"
    assert found[f"{history}: captions found less than with the whole"] == ("0.5%", True)
    assert found[f"{history}: lead on sliding window, likeness to the whole"] == ("-1.0 dB", False)
    assert found[f"{history}: lead on random tokens, likeness to the whole"] == ("+5.0 dB", True)
    cut = "a cut at 8,192 tokens against the formula written out"
    assert (found[f"{cut}: faster"], found[f"{cut}: memory smaller"]) == (("9.00x", True), ("9.00x", False))


def test_a_prediction_is_for_its_length():
    shorter = copy.deepcopy(REPORT)
    shorter["size"]["chunks"] = 4
    assert told(shorter)["quality balanced: off its prediction"] == ("", None)


def test_the_table_hides_no_failure():
    words = table(REPORT)
    assert "| magi: likeness at 10x by time | at least 32.00 dB | 8.0x is the fastest | **no** |" in words
    assert "| skyreels: likeness at 8x by time | at least 38.00 dB |  | not measured |" in words
    assert "left out: magi: periodic, held, every 4th." in words
    whole = copy.deepcopy(REPORT)
    whole["left_out"] = []
    assert "left out: " not in table(whole).replace("LPIPS is left out: ", "")
