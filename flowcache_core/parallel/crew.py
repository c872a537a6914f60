"""Processes that a program starts for itself, tells what to do, and ends: it is the first of a team, they are the rest.

Each reads messages from its standard input, and ends when that does, so that none outlives the program, however that
ends. It writes signs of life to its standard output; one that gives none is killed, for then an exchange with it, in
which the program may be held up, comes to an end as well.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from ..errors import UserError, first_line
from .team import BEAT, HELD_UP, LOST, Team

HERE = "127.0.0.1"
MEETING = timedelta(seconds=60)  # that all of them may take to meet, when each has said that it is there
LEAVING = threading.Lock()  # whoever finds that one is gone, and whoever ends all for it, may come at one time
STARTING = 300.0  # seconds that a process may take to say that it is there, or has done what it was told


class Crew:
    """The processes beside this one.

    Args:
        command: that starts one, by its number from 1.
        environment: of each, beside this process's own.
        waiting: called all the while something is waited for; may raise to end that.
        held: around whatever the others take part in, so that nothing but a fault ends it half way.

    Attributes:
        team: all processes, this one is the first; once they have met.
        lost: what was found wrong with one; None while all are there.
        failure: of a piece of work that was left half way, after which all have ended.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        environment: Sequence[Mapping[str, str]],
        waiting: Callable[[], object] = lambda: None,
        held: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.waiting, self.held = waiting, held
        self.team: Team | None = None
        self.lost: str | None = None
        self.failure: BaseException | None = None
        self.ended = False
        self._said: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._seen: dict[int, float] = {}
        self._processes: dict[int, subprocess.Popen] = {}
        for number, more in enumerate(environment, start=1):
            started = subprocess.Popen(
                command(number), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | more
            )
            self._processes[number], self._seen[number] = started, time.monotonic()
            threading.Thread(target=self._listen, args=(number,), name="flowcache-worker", daemon=True).start()
        threading.Thread(target=self._watch, name="flowcache-watch", daemon=True).start()

    @property
    def size(self) -> int:
        """Processes, this one included."""
        return 1 + len(self._processes)

    def meet(self, device: torch.device) -> Team:
        """Waits until the others are there, and makes the team of all."""
        if dist.is_initialized():
            raise UserError(
                "Another node pack uses torch.distributed in this process, so no workers can be joined; restart "
                "ComfyUI without it."
            )
        self.wait("here")
        store = dist.TCPStore(HERE, 0, self.size, is_master=True, wait_for_workers=False, timeout=MEETING)
        for number in self._processes:
            self.tell(("meet", store.port, number, self.size), only=number)
        with self.section():
            self.team = join(store, 0, self.size, device)
        return self.team

    def tell(self, message: tuple, only: int | None = None) -> None:
        """Tells the others what to do next."""
        self._refuse()
        try:
            words = pickle.dumps(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"Workers cannot be told of something in this run ({first_line(error)}); bypass FlowCache over GPUs."
            ) from error
        for number, process in self._processes.items():
            if only in (None, number):
                try:
                    assert process.stdin is not None
                    process.stdin.write(words)
                    process.stdin.flush()
                except OSError as error:
                    raise self._given_up(error) from error

    def wait(self, word: str) -> None:
        """Waits until each of the others has said a word."""
        missing, deadline = set(self._processes), time.monotonic() + STARTING
        try:
            while missing:
                self.waiting()
                if self.lost is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"no '{word}' of process {min(missing)}")
                try:
                    number, said = self._said.get(timeout=0.05)
                except queue.Empty:
                    continue
                if said == word:
                    missing.discard(number)
        except BaseException as error:
            raise self._given_up(error) from error

    @contextmanager
    def section(self) -> Iterator[None]:
        """Work that all take part in. What ends it half way ends the others too, who wait for this process's part."""
        self._refuse()
        try:
            with self.held():
                yield
            if self.lost is not None:  # what came of it is nothing
                raise ConnectionError(self.lost)
        except BaseException as error:
            raise self._given_up(error) from error

    def end(self) -> None:
        """Ends the others."""
        if self.ended:
            return
        self.ended = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    assert pipe is not None
                    pipe.close()
                except OSError:  # what was not sent any more
                    pass
        if self.team is not None:
            leave(self.team.device)

    def _refuse(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.lost is not None:
            raise self._given_up(UserError(over(self.lost)))

    def _given_up(self, error: BaseException) -> BaseException:
        """Ends all for an error here; gives what to raise, which is the reason of whoever failed first."""
        if isinstance(error, RuntimeError | OSError) and self.lost is None:
            # A process that has ended is noticed by its exchange, and by whoever listens to it, at nearly one time.
            deadline = time.monotonic() + BEAT
            while self.lost is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self.failure = error if self.lost is None else UserError(over(self.lost))
        self.end()
        return self.failure

    def _listen(self, number: int) -> None:
        """Hears one of the others until it has ended."""
        process, why = self._processes[number], ""
        pipe = process.stdout
        assert pipe is not None
        try:
            while True:
                word, more = pickle.load(pipe)
                self._seen[number] = time.monotonic()
                if word == "failed":
                    why = more
                elif word != "beat":
                    self._said.put((number, word))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            pass
        if self.ended:
            return
        try:
            code = process.wait(LOST)
        except subprocess.TimeoutExpired:
            code = None
        self._lose(f"process {number} has failed ({why})" if why else f"process {number} has ended (code {code})")

    def _watch(self) -> None:
        while not self.ended and self.lost is None:
            time.sleep(BEAT)
            silent = [number for number, seen in list(self._seen.items()) if time.monotonic() - seen > LOST]
            if silent and not self.ended:
                self._lose(f"process {silent[0]} gives no sign of life")

    def _lose(self, how: str) -> None:
        """Tells of a process that is gone, and has an exchange with it end."""
        self.lost = self.lost or how
        for process in self._processes.values():
            process.kill()
        if self.team is not None and self.team.device.type == "cuda":
            leave(self.team.device)  # a GPU would go on waiting


def over(how: str) -> str:
    """What the user is told."""
    return f"{how[0].upper()}{how[1:]}, so all workers end; run it again, what Resume kept is gone on from."


def join(store: dist.Store, rank: int, size: int, device: torch.device) -> Team:
    """Makes this process one of a team."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Torch would end the whole program where a GPU of another process is gone; here that is seen by other means.
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=HELD_UP)
    return Team(rank, size, device)


def leave(device: torch.device) -> None:
    """Lets go of a team that may have lost members."""
    with LEAVING:
        if not dist.is_initialized():
            return
        if device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


class Orders:
    """The other end: what a process is told, and how it answers. Made first of all, for it takes standard output away
    from whatever prints.
    """

    def __init__(self):
        self._answers: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._lock = threading.Lock()
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._beat, daemon=True).start()

    def listen(self) -> Iterator[tuple]:
        """Messages, as they come; to be called when all that they may hold can be imported."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            yield self._told.get()

    def say(self, word: str, more: str = "") -> None:
        """Answers."""
        try:
            with self._lock:
                pickle.dump((word, more), self._answers)
                self._answers.flush()
        except OSError:  # nobody is there to hear it
            os._exit(3)

    def _read(self) -> None:
        try:
            while True:
                self._told.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)  # even from the midst of an exchange
        except Exception as error:
            self.say("failed", first_line(error))
            os._exit(3)

    def _beat(self) -> None:
        while True:
            self.say("beat")
            time.sleep(BEAT)
