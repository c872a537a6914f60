"""The processes of one run: how they are told apart, what they agree on, and how all of them end when one does.

A process that is killed, or hangs, is found by the others within `LOST` seconds; one that fails tells them. What was
finished is on disk by then, where the run is kept.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..engine.loop import Cancelled
from ..errors import UserError, first_line

BEAT = 1.0  # seconds between two signs of life
LOST = 12.0  # seconds without one, after which a process counts as gone
HELD_UP = timedelta(minutes=30)  # that an exchange may take: as long as others may have to move their history away


@dataclass
class Team:
    """The processes of one run.

    Attributes:
        rank, size: of this process, and how many there are.
        device: that this process computes on.
        stop: whether this process was asked to stop.
    """

    rank: int
    size: int
    device: torch.device
    stop: Callable[[], bool] = lambda: False

    @classmethod
    def join(cls, kind: str | None = None) -> "Team":
        """Meets the others where the launcher says.

        Args:
            kind: of device, "cpu" or "cuda"; None takes GPUs where there is one for each process of this machine.
        """
        here = int(os.environ.get("LOCAL_RANK", "0"))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if kind is None:
            kind = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= beside else "cpu"
        if kind == "cuda" and (not torch.cuda.is_available() or torch.cuda.device_count() <= here):
            raise UserError(
                f"Process {here} of this machine has no GPU; start fewer with --nproc-per-node, or --device cpu."
            )
        device = torch.device("cuda", here) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // beside))
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=HELD_UP)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Lets go of the others, when all is done."""
        dist.destroy_process_group()

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process; all of them ask at the same place."""
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def from_first(self, thing):
        """What the first process says."""
        box = [thing]
        dist.broadcast_object_list(box, 0)
        return box[0]

    @contextmanager
    def together(self, ended: Callable[[str], None]) -> Iterator[None]:
        """Looks after the others inside the block, which leaves with an error where one is gone.

        Args:
            ended: called from a thread of its own when another process is gone, and told how, for one that is held up
                in an exchange with it.
        """
        watch = Watch(self.rank, self.size, ended)
        try:
            yield
        except RuntimeError as error:
            if watch.lost is None and not _is_of_an_exchange(error):
                watch.fail(first_line(error))
                raise
            raise UserError(gone(watch.lost or "a process of this run has ended")) from error
        except Cancelled:  # which all have agreed on
            raise
        except BaseException as error:
            watch.fail(str(error) or type(error).__name__)
            raise
        finally:
            watch.stop()


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Says whether this process was asked to stop (Ctrl-C, SIGTERM), which it then does where all can; asked again, it
    stops at once."""
    asked = threading.Event()

    def ask(number, frame) -> None:
        asked.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gone(how: str) -> str:
    """What the user is told."""
    return f"{how[0].upper()}{how[1:]}, so all end; run it again, what was kept with --resume is gone on from."


class Watch:
    """Signs of life of all processes, in the store by which they met.

    Attributes:
        lost: what was found; None while all are there.
    """

    def __init__(self, rank: int, size: int, ended: Callable[[str], None]):
        self.rank, self.others, self.ended = rank, [other for other in range(size) if other != rank], ended
        self.lost: str | None = None
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # of this thread alone
        self._store.set_timeout(timedelta(seconds=LOST))
        self._stopped = threading.Event()
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, name="flowcache-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it; this process may leave before the others do."""
        self._stopped.set()
        self._thread.join(LOST)
        self._tell("left", "")

    def fail(self, why: str) -> None:
        """Tells the others that this process ends for want of something, and what."""
        self._tell("failed", why)

    def _tell(self, key: str, words: str) -> None:
        try:
            self._store.set(f"{key}/{self.rank}", words or "1")
        except Exception:  # whoever holds the store is gone, and so the others know
            return

    def _watch(self) -> None:
        seen = dict.fromkeys(self.others, ("", time.monotonic()))
        beat = 0
        while not self._stopped.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                self.lost = next(filter(None, (self._gone(other, seen) for other in self.others)), None)
            except Exception as error:  # of the store's own kinds, by version
                self.lost = f"the process that they met at is gone ({first_line(error)})"
            if self.lost is not None and not self._stopped.is_set():
                self.ended(self.lost)
                return

    def _gone(self, other: int, seen: dict[int, tuple[str, float]]) -> str | None:
        store, now = self._store, time.monotonic()
        if store.check([f"failed/{other}"]):
            return f"process {other} has failed ({store.get(f'failed/{other}').decode()})"
        if store.check([f"left/{other}"]):
            return None
        beat = store.get(f"beat/{other}").decode() if store.check([f"beat/{other}"]) else ""
        if beat != seen[other][0]:
            seen[other] = beat, now
        return f"process {other} gives no sign of life" if now - seen[other][1] > LOST else None


def leave(how: str) -> None:
    """Ends a process of the command line at once: it may be held up in an exchange that nobody answers."""
    print(f"error: {gone(how)}", file=sys.stderr, flush=True)
    os._exit(3)


def _is_of_an_exchange(error: RuntimeError) -> bool:
    words = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in words or "connection" in words or "nccl" in words
