"""Aims are read off a report as they are worded: at equal forwards, by the smallest lead, failing where they fail."""

import copy

import pytest

from flowcache_core.lab.aims import aims, at, faster_at
from flowcache_core.lab.table import table

LOOKS = {"st_lpips": {"mean": 0.0123}, "vmaf": None, "motion": {"mean": 0.2}, "jumps": {"mean": 1.1}}
LOOKS |= {"colour": {"mean": 3.0}}


def point(method, setting, fewer, psnr, forced=None, schedule="magi", timed="batch", overhead=0.01):
    return {
        "schedule": schedule, "method": method, "setting": setting, "speedup": fewer, "psnr": psnr, "ssim": 0.9,
        "psnr_vae": None, "psnr_converged": None, "detector": 0.9, "overhead": overhead, "timed": timed,
        "forwards_total": 6400, "forwards_executed": round(6400 / fewer), "psnr_median": psnr, "psnr_error": None,
        "forced": forced, "forced_median": forced, "forced_error": None, "looks": LOOKS,
    }  # fmt: skip


def kept(name, detector, psnr, bounded=True):
    quality = {"detector": detector, "detector_first": 0.95, "detector_last": 0.9}
    likeness = psnr and {"psnr": psnr}
    told = {"name": name, "bounded": bounded, "quality": quality, "likeness": likeness}
    return told | {"history_bytes": 2**20, "looks": LOOKS}


def package(method, speedup, psnr):
    told = {"method": method, "setting": "", "speedup": speedup, "seconds": 1.0, "psnr": psnr}
    return told | {"error": 1.0, "st_lpips": None}


REPORT = {
    "machine": {"cores": 2, "processor": "a processor", "torch": "2.13"},
    "size": {"clips": 8, "chunks": 16, "pairs": 5, "converged_clips": 4, "converged_chunks": 6},
    "points": [
        point("ours", "30 steps", 2.0, 54.0, 66.0, timed="pairs", overhead=0.02),
        point("ours", "15 steps", 4.0, 46.0, 58.0, timed="pairs", overhead=0.035),
        point("ours", "9 steps", 8.0, 38.0, 50.0),
        point("fewer steps, Euler", "16 steps", 4.0, 36.0, 37.0),
        point("fewer steps, AB2", "16 steps", 4.0, 42.0, 50.0),
        point("fewer steps, AB2", "4 steps", 16.0, 60.0, 60.0),  # out of the range
        point("FlowCache's rule", "threshold 0.1", 2.0, 30.0, 55.0),
        point("FlowCache's rule", "threshold 0.2", 4.0, 44.0, 40.0),
        point("ours", "3 steps", 1.25, 20.0, schedule="causal", timed="pairs"),
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
            kept("8 bits, all chunks", 0.9, 45.0, bounded=False),
        ],
    },
    "peers": {
        "versions": {"diffusers": "1", "cache-dit": "2"}, "clips": 8, "chunks": 12, "plain_to_plain_psnr": 100.0,
        "rows": [
            package("ours", 4.0, 50.0),
            package("ours", 16.0, 30.0),
            package("cache-dit", 1.5, 60.0),  # too slow to count
            package("cache-dit", 2.0, 40.0),
            package("cache-dit", 3.2, 30.0),
            package("diffusers", 9.0, 50.0),
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


def test_how_fast_a_curve_is_at_a_likeness():
    curve = [(2.0, 50.0), (8.0, 30.0)]
    assert faster_at(curve, 40.0) == pytest.approx(4.0)
    assert (faster_at(curve, 30.0), faster_at(curve, 20.0), faster_at(curve, 51.0)) == (8.0, 8.0, None)


def test_every_aim_says_what_was_reached():
    found = told(REPORT)
    clock = "by the clock: likeness teacher-forced / free"
    assert found[f"magi, 4x {clock}"] == ("58.0 / 46.0 dB", True)
    assert found[f"magi, 6.5x {clock}"] == ("52.4 / 40.4 dB", True)
    assert found[f"magi, 10x {clock}"] == ("no run is so fast", False)
    assert found[f"skyreels, 8x {clock}"] == ("", None)
    equal = "at equal forwards, 2x to 10x, teacher-forced / free"
    assert found[f"magi: lead on the best solver with fewer steps {equal}"] == ("+8.0 / +4.0 dB", True)
    assert found[f"magi: lead on the best published rule {equal}"] == ("+11.0 / +2.0 dB", False)
    assert found[f"skyreels: lead on the best published rule {equal}"] == ("", None)
    assert found["overhead of many steps (the worst: magi, 15 steps)"] == ("3.5%", False)
    assert found["overhead of four steps (the worst: causal, 3 steps)"] == ("1.0%", True)
    assert found["faster than cache-dit at equal likeness, 2x and up"] == ("4.0x", True)
    assert found["quality balanced: off its prediction (38.5 dB; 40.0 ± 1.2 measured)"] == ("1.5 dB", True)
    assert found["1,000 chunks: time of the last 100 over chunks 50 to 150"] == ("1.040x", False)
    history = "history of 3 clean chunks, 64 chunks long"
    assert found[f"{history}: captions found less than with the whole"] == ("0.5%", True)
    best = "lead on the best other choice (sliding window), likeness to the whole"
    assert found[f"{history}: {best}"] == ("-1.0 dB", False)


def test_a_prediction_is_for_its_length():
    shorter = copy.deepcopy(REPORT)
    shorter["size"]["chunks"] = 4
    assert told(shorter)["quality balanced: off its prediction"] == ("", None)


def test_the_table_hides_no_failure():
    words = table(REPORT)
    clock = "by the clock: likeness teacher-forced / free"
    assert f"| magi, 10x {clock} | 40.0 / 33.0 dB | no run is so fast | **no** |" in words
    assert f"| skyreels, 8x {clock} | 50.0 / 42.0 dB |  | not measured |" in words
    assert "| ours | 30 steps | 2.0x | 0.0123 | – | 0.200 | 1.10 | 3.00 |" in words
    assert "left out: magi: periodic, held, every 4th." in words
    whole = copy.deepcopy(REPORT)
    whole["left_out"] = []
    assert "left out: " not in table(whole)
