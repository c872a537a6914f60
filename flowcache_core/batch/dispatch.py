"""Hands jobs to workers, and takes what came of them; it knows nothing of how they are reached.

A job whose worker dies goes to another one, which goes on from what is kept of the run. Jobs of one model go to workers
that have it, as far as such jobs are near. Whatever the number of jobs, only those are held that workers have and those
that are looked ahead at.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .jobs import Job
from .manifest import Manifest

AHEAD = 64  # jobs that are looked through for one of a worker's model
ATTEMPTS = 3  # workers that a job may end, before it counts as failed


@dataclass(frozen=True)
class Ended:
    """What came of a job.

    Attributes:
        worker: that had it.
        files: names and contents.
        reports: of its nodes, in words.
        error: why it failed, or "".
        lost: the worker is gone with it.
    """

    worker: Hashable
    files: Sequence[tuple[str, bytes]] = ()
    reports: Sequence[str] = ()
    error: str = ""
    lost: bool = False


class Workers(Protocol):
    """Those who do the work."""

    def names(self) -> Sequence[Hashable]:
        """Those who are there."""

    def begin(self, worker: Hashable, job: Job) -> None:
        """Gives a worker a job."""

    def ended(self, seconds: float) -> list[Ended]:
        """Waits for what ends, so long at most."""

    def replace(self, worker: Hashable) -> None:
        """Gets another worker in the place of one that is gone, under the same name."""


@dataclass
class Tally:
    """How far it is.

    Attributes:
        total: jobs in all.
        done, failed, again: that are done (earlier ones included), have failed, were begun anew.
        begun: when.
        dispatch: seconds spent between what ends and what begins.
    """

    total: int
    done: int = 0
    failed: int = 0
    again: int = 0
    begun: float = field(default_factory=time.monotonic)
    dispatch: float = 0.0
    now: int = 0  # done or failed since it began

    def text(self) -> str:
        """One line."""
        left = self.total - self.done - self.failed
        words = f"{self.done} of {self.total} jobs done"
        if self.failed:
            words += f", {self.failed} failed"
        if self.now:
            seconds = (time.monotonic() - self.begun) / self.now * left
            words += f", {seconds:.0f} s left" if seconds < 120 else f", {seconds / 60:.0f} min left"
        return words


def dispatch(
    jobs: Iterable[Job],
    workers: Workers,
    manifest: Manifest,
    tally: Tally,
    take: Callable[[Job, Ended], dict],
    tell: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Runs all jobs.

    Args:
        take: keeps the results of a job; what it gives goes into the manifest.
        tell: called now and then.
    """
    waiting: deque[Job] = deque()
    source = iter(jobs)
    busy: dict[Hashable, tuple[Job, float]] = {}
    holds: dict[Hashable, str] = {}
    attempts: dict[int, int] = {}
    idle = deque(workers.names())

    def refill() -> None:
        while len(waiting) < AHEAD:
            job = next(source, None)
            if job is None:
                return
            if job.error:
                manifest.add(job.number, job.digest, "failed", error=job.error)
                tally.failed += 1
            else:
                waiting.append(job)

    refill()
    while waiting or busy:
        began = time.perf_counter()
        while idle and waiting:
            worker = idle.popleft()
            job = next((one for one in waiting if one.model == holds.get(worker)), waiting[0])
            waiting.remove(job)
            holds[worker] = job.model
            busy[worker] = job, time.monotonic()
            workers.begin(worker, job)
            refill()
        tally.dispatch += time.perf_counter() - began
        for ended in workers.ended(1.0) if busy else []:
            began = time.perf_counter()
            job, since = busy.pop(ended.worker)
            if ended.lost:
                holds.pop(ended.worker, None)
                workers.replace(ended.worker)
                attempts[job.number] = attempts.get(job.number, 0) + 1
            idle.append(ended.worker)
            if ended.lost and attempts[job.number] < ATTEMPTS:
                waiting.appendleft(job)
                tally.again += 1
                tally.dispatch += time.perf_counter() - began
                continue
            again, seconds = attempts.pop(job.number, 0), round(time.monotonic() - since, 2)
            tally.now += 1
            if ended.error:
                tally.failed += 1
                manifest.add(job.number, job.digest, "failed", error=ended.error, seconds=seconds, attempts=again + 1)
            else:
                kept = take(job, ended)
                tally.done += 1
                manifest.add(job.number, job.digest, "done", **kept, seconds=seconds, attempts=again + 1)
            tally.dispatch += time.perf_counter() - began
        tell(tally)
