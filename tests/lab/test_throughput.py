"""The measurement of throughput, by workers that only sleep; the real ones need Ray and a ComfyUI."""

import time

import pytest

from flowcache_core.batch.dispatch import Ended
from flowcache_core.errors import UserError
from flowcache_core.lab.throughput import measure, video

TAKES = 0.05  # seconds of a job


class Sleepers:
    """Workers who sleep at the same time."""

    def __init__(self, fails: bool = False):
        self.fails, self.until, self.most, self.seeds = fails, {}, 0, []

    def names(self):
        return [0, 1]

    def begin(self, worker, job) -> None:
        self.until[worker] = time.monotonic() + TAKES
        self.most = max(self.most, len(self.until))
        self.seeds += [node["inputs"]["seed"] for node in job.graph.values() if "seed" in node["inputs"]]

    def ended(self, seconds):
        first = min(self.until, key=self.until.get)
        time.sleep(max(0.0, self.until.pop(first) - time.monotonic()))
        return [Ended(first, error="it fails" if self.fails else "", files=[("a.latent", b"")])]

    def replace(self, worker) -> None:
        raise AssertionError


def test_two_make_about_twice_as_many(tmp_path):
    workers, told = Sleepers(), []
    found = measure(workers, 6, 1, 2, tmp_path, told.append)
    assert 1.5 < found["ratio"] < 2.2 and workers.most == 2
    assert found["workers"] == 2 and [len(seconds) for seconds in found["seconds"]] == [2, 2]
    assert len(told) == 4 and "6 videos, 2 workers, run 2" in told[-1]
    assert len(set(workers.seeds)) == len(workers.seeds) == 2 + 4 * 6  # a video that was there would cost nothing


def test_a_video_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(UserError, match="2 of 2 videos failed: .*it fails"):
        measure(Sleepers(fails=True), 2, 1, 1, tmp_path, print)


def test_workflow_keeps_its_latents():
    kinds = [node["class_type"] for node in video(1, 2).values()]
    assert kinds[-1] == "SaveLatent" and "FlowCacheAutoregressiveExtend" in kinds
