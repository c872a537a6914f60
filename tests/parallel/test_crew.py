"""Processes that a program starts for itself: found when they hang or fail, and gone when the program is."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flowcache_core.errors import UserError
from flowcache_core.parallel import crew as crews
from flowcache_core.parallel.crew import Crew
from tests.helpers.paths import ROOT

FOLLOWER = """
import os, sys
sys.path.insert(0, {root!r})
from flowcache_core.parallel.crew import Orders
orders = Orders()
print("what is printed is no answer")
orders.say("here", str(os.getpid()))
for what, *told in orders.listen():
    if what == "fail":
        orders.say("failed", "out of memory in layer 3")
        raise SystemExit(1)
    orders.say(what)
"""
PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from flowcache_core.parallel.crew import Crew
crew = Crew(lambda number: [sys.executable, "-c", {follower!r}], [dict()])
crew.wait("here")
print(crew._processes[1].pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def crew():
    made = Crew(lambda number: [sys.executable, "-c", FOLLOWER.format(root=str(ROOT))], [{}])
    made.wait("here")
    yield made
    made.end()


def process_of(crew: Crew) -> subprocess.Popen:
    return crew._processes[1]


def test_one_that_hangs_is_found(crew, monkeypatch):
    monkeypatch.setattr(crews, "LOST", 2.0)
    crew.tell(("well",))
    crew.wait("well")
    process_of(crew).send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="Process 1 gives no sign of life, so all workers end"):
        crew.wait("nothing")
    assert process_of(crew).poll() is not None
    with pytest.raises(UserError, match="no sign of life"):
        crew.tell(("well",))


def test_why_one_has_failed_is_told_whatever_is_noticed_first(crew):
    crew.tell(("fail",))
    with pytest.raises(UserError, match="failed .out of memory in layer 3., so all workers end"), crew.section():
        process_of(crew).wait()
        raise RuntimeError("Connection closed by peer")


def test_work_that_seems_done_without_one_is_not(crew):
    with pytest.raises(UserError, match="Process 1 has ended .code -9."), crew.section():
        process_of(crew).kill()
        while crew.lost is None:  # a GPU goes on with whatever is there
            time.sleep(0.01)


def test_what_ends_a_piece_of_work_half_way_ends_all(crew):
    with pytest.raises(KeyError, match="here"), crew.section():
        raise KeyError("here")
    assert process_of(crew).poll() is not None
    with pytest.raises(KeyError, match="here"):  # whoever asks later is told the same
        crew.tell(("well",))


def test_what_cannot_be_told_leaves_all_as_they_are(crew):
    with pytest.raises(UserError, match="bypass FlowCache over GPUs"):
        crew.tell((lambda: None,))
    crew.tell(("well",))
    crew.wait("well")


def test_none_outlives_a_program_that_is_killed():
    follower = FOLLOWER.format(root=str(ROOT))
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT), follower=follower)], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    with program.stdout as said:
        number = int(said.readline())
        program.kill()
    program.wait()
    deadline = time.monotonic() + 10
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(number)


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return "Z" not in subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
