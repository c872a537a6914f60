"""Jobs of a file, their manifest, and how they are handed to workers."""

import json

import pytest

from flowcache_core.batch.command import keep
from flowcache_core.batch.dispatch import ATTEMPTS, Ended, Tally, dispatch
from flowcache_core.batch.jobs import Job, Workflow, read_jobs
from flowcache_core.batch.manifest import Manifest
from flowcache_core.errors import UserError

GRAPH = {
    "1": {"class_type": "LoadModel", "inputs": {"file": "a"}, "_meta": {"title": "Load"}},
    "2": {"class_type": "FlowCacheAutoregressiveExtend", "inputs": {"seed": 0, "model": ["1", 0]}},
    "3": {"class_type": "Prompt", "inputs": {"text": ""}, "_meta": {"title": "Caption"}},
    "4": {"class_type": "Prompt", "inputs": {"text": ""}, "_meta": {"title": "Negative"}},
}


def written(folder, *lines) -> tuple:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path, Manifest(folder / "out", len(lines))


def test_a_line_fills_inputs_by_name(tmp_path):
    path, manifest = written(tmp_path, {"seed": 5, "Caption.text": "a dog", "4.text": "no cat", "LoadModel.file": "b"})
    (job,) = read_jobs(path, Workflow(GRAPH), manifest.done)
    assert not job.error and job.graph["2"]["inputs"]["seed"] == 5
    assert [job.graph[node]["inputs"]["text"] for node in "34"] == ["a dog", "no cat"]
    assert job.graph["2"]["inputs"]["resume"] == ["resume", 0]  # so that another worker can go on
    assert job.graph["resume"]["class_type"] == "FlowCacheResume" and GRAPH["2"]["inputs"]["seed"] == 0
    assert job.model != next(read_jobs(*_plain(tmp_path))).model


def _plain(folder):
    path, manifest = written(folder, {"seed": 5})
    return path, Workflow(GRAPH), manifest.done


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": "a"}, "several nodes have an input 'text': write 3.text (Caption), 4.text (Negative)"),
        ({"model": "a"}, "no node has an input 'model'"),  # a link
        ("{", "line 1: Expecting"),
        ("[1]", "no JSON object"),
        ("[" * 5000, "line 1: "),
    ],
)
def test_a_bad_line_is_told_and_the_others_are_run(tmp_path, line, said):
    path, manifest = written(tmp_path, line, {"seed": 1})
    bad, good = read_jobs(path, Workflow(GRAPH), manifest.done)
    assert said in bad.error and not good.error


def test_a_workflow_of_the_page_is_refused(tmp_path):
    for graph in ({"nodes": [], "links": []}, [], {}):
        with pytest.raises(UserError, match="not in the API's form"):
            Workflow(graph)


class Pretended:
    """Workers that end at once; some are lost with some jobs."""

    def __init__(self, count: int, lost=(), fails=()):
        self.count, self.lost, self.fails = count, list(lost), fails
        self.running: list[tuple] = []
        self.begun: list[tuple] = []
        self.replaced: list = []

    def names(self):
        return list(range(self.count))

    def begin(self, worker, job):
        assert worker not in [one for one, _ in self.running]
        self.running.append((worker, job))
        self.begun.append((worker, job.number, job.model))

    def ended(self, seconds):
        worker, job = self.running.pop(0)
        if job.number in self.lost:
            self.lost.remove(job.number)
            return [Ended(worker, error="gone", lost=True)]
        failed = job.number in self.fails
        return [Ended(worker, [("a/b.txt", b"made")], ["a report"], error="too hot" if failed else "")]

    def replace(self, worker):
        self.replaced.append(worker)


def run(path, manifest, workers, out, total):
    tally = Tally(total, manifest.done.count)
    dispatch(read_jobs(path, Workflow(GRAPH), manifest.done), workers, manifest, tally, lambda *of: keep(out, *of))
    manifest.close()
    return tally


def test_a_lost_job_goes_to_another_worker_and_what_is_missing_is_run_again(tmp_path):
    path, manifest = written(tmp_path, *({"seed": number} for number in range(6)), "bad", {"seed": 9})
    out = tmp_path / "out"
    workers = Pretended(2, lost=[2, 5, 5, 5], fails=[4])
    tally = run(path, manifest, workers, out, 8)
    assert (tally.done, tally.failed, tally.again) == (5, 3, 1 + ATTEMPTS - 1)  # line 5 ends three workers, and fails
    assert len(workers.replaced) == 4
    assert (out / "000001" / "b.txt").read_bytes() == b"made" and "a report" in (
        out / "000001" / "report.txt"
    ).read_text()
    entries = [json.loads(line) for line in manifest.path.read_text().splitlines()]
    assert {entry["line"]: entry["status"] for entry in entries} == {
        1: "done", 2: "done", 3: "done", 4: "failed", 5: "failed", 6: "done", 7: "failed", 8: "done",
    }  # fmt: skip
    with manifest.path.open("a") as file:
        file.write('{"line": 4, "job"')  # cut short by a crash
    again = Manifest(out, 8)
    workers = Pretended(1)
    tally = run(path, again, workers, out, 8)
    assert [number for _, number, _ in workers.begun] == [4, 5] and (tally.done, tally.failed) == (7, 1)
    other = Workflow(GRAPH | {"5": {"class_type": "Preview", "inputs": {}}})
    assert len(list(read_jobs(path, other, Manifest(out, 8).done))) == 8  # another workflow: nothing of it is done


def test_jobs_go_to_workers_that_have_their_model(tmp_path):
    path, manifest = written(tmp_path, *({"file": "ab"[number % 2]} for number in range(20)))
    workers = Pretended(2)
    run(path, manifest, workers, tmp_path / "out", 20)
    assert all(len({model for one, _, model in workers.begun if one == worker}) == 1 for worker in (0, 1))


def test_no_more_jobs_are_read_than_are_looked_ahead_at(tmp_path):
    read = 0

    def endless():
        nonlocal read
        for number in range(1, 2001):
            read += 1
            yield Job(number, GRAPH, f"{number:016x}")

    manifest, seen = Manifest(tmp_path, 2000), []
    tell = lambda tally: seen.append(read - tally.done)  # noqa: E731
    dispatch(endless(), Pretended(4), manifest, Tally(2000), lambda job, ended: {}, tell)
    assert manifest.done.count == 2000 and max(seen) <= 64 + 4 + 1
