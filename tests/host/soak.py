"""Hard use of a ComfyUI: many prompts of mixed kind, interrupts, kills, two clients, jumps of the clock, failing steps,
captions for a run that goes on.

As a script: python tests/host/soak.py, or with some of the parts alone: python tests/host/soak.py prompts kills
docs/reliability.md has what it printed last.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

import torch  # noqa: E402

from tests.helpers.host.comfy_server import Outcome, Server  # noqa: E402
from tests.helpers.host.graph import Graph  # noqa: E402
from tests.helpers.host.mixed_prompts import (  # noqa: E402
    GOOD,
    anew,
    extend,
    interrupted,
    kept,
    latent,
    plain,
    prepare,
    unfit,
)
from tests.helpers.host.videos import frames_of  # noqa: E402
from tests.helpers.paths import ROOT  # noqa: E402

WARM = 20  # prompts after which memory must not grow any more
MOST_GROWTH = 0.02
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Usage:
    """What a server's process holds: bytes of memory, threads, open files, files in its temporary folder."""

    memory: int
    threads: int
    files: int
    temporary: int

    @classmethod
    def of(cls, server: Server) -> "Usage":
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            memory=1024 * int(fields["VmRSS"].split()[0]),
            threads=int(fields["Threads"]),
            files=len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())),
            temporary=sum(1 for path in (server.base / "temp").rglob("*") if path.is_file()),
        )

    def __str__(self) -> str:
        return (
            f"{self.memory / 2**20:.1f} MB, {self.threads} threads, {self.files} open files, {self.temporary} temporary"
        )


def start(base: Path) -> Server:
    """A server with the network that the prompts look for, and with the nodes that the tests bring."""
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "flowcache_test"
    if not link.exists():
        link.symlink_to(ROOT / "tests" / "helpers" / "host" / "custom_nodes", target_is_directory=True)
    server = Server(base)
    prepare(server)
    return server


def set_up(server: Server, **inputs) -> None:
    """Runs TestHardTimes: what of the server's clock and steps is changed."""
    graph = Graph()
    graph.add("TestHardTimes", **inputs)
    assert server.run(graph).error is None


def objects(server: Server) -> Counter:
    """Live objects of the server by type, and bytes of its tensors under "tensor bytes"."""
    graph = Graph()
    node = graph.add("TestLiveObjects")
    return Counter({name: count for name, count in server.run(graph).outputs[node]["objects"][0].items()})


def resident(server: Server) -> Counter:
    """Kilobytes of the server's memory by what is mapped there."""
    found, name = Counter(), ""
    for line in Path(f"/proc/{server.process.pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            name = Path(words[5]).name if len(words) > 5 else "anonymous"
        elif words[0] == "Rss:":
            found[name] += int(words[1])
    return found


@dataclass(frozen=True)
class Held:
    """All that is looked at to name what grows."""

    usage: Usage
    objects: Counter
    resident: Counter

    @classmethod
    def of(cls, server: Server) -> "Held":
        return cls(Usage.of(server), objects(server), resident(server))

    def grown(self, before: "Held") -> str:
        """Names what there is more of than before, most first."""
        types = (self.objects - before.objects).most_common(8)
        places = (self.resident - before.resident).most_common(4)
        mapped = ", ".join(f"{name} {kilobytes / 1024:+.1f} MB" for name, kilobytes in places)
        return f"{mapped}; " + ", ".join(f"{name} {count:+}" for name, count in types)


def check_interrupts(server: Server, times: int, seed: int = 0) -> int:
    """Interrupts a run at so many random moments; after each, a good prompt must give the same bits.

    Returns:
        How many runs ended by the interrupt; others were quicker than it.
    """
    rng = random.Random(seed)
    messages = []
    server.run(plain(1), on_event=lambda kind, data: messages.append(kind))
    expected = {make: latent(server, server.run(make(77))) for make in GOOD}
    ended = 0
    for number in range(times):
        graph = Graph()
        node = extend(graph, 1000 + number, chunks=rng.choice((2, 30)), guidance=rng.choice((1.0, 3.0)))
        graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
        ended += interrupted(server, graph, rng.randint(1, 2 * len(messages))).interrupted
        make = rng.choice(GOOD)
        again = server.run(anew(make(77), 1 + number))
        assert torch.equal(latent(server, again), expected[make]) and len(again.executed) > 3, (number, make.__name__)
    return ended


def soak(server: Server, prompts: int, seed: int = 0) -> tuple[Held, Held]:
    """Runs prompts of mixed kind. Returns what the server holds after the warm-up and at the end."""
    rng = random.Random(seed)
    expected = {make: latent(server, server.run(make(77))) for make in GOOD}
    warm = Held.of(server)
    for number in range(prompts):
        if number == WARM:
            warm = Held.of(server)
        chance = rng.random()
        if chance < 0.1:
            outcome = server.run(unfit(number))
            assert outcome.error is not None and outcome.error["exception_type"].endswith("UserError")
        elif chance < 0.25:
            interrupted(server, rng.choice(GOOD)(100 + number), rng.randint(1, 40))
        elif chance < 0.4:
            make = rng.choice(GOOD)
            again = server.run(anew(make(77), 1 + number))
            assert torch.equal(latent(server, again), expected[make]) and len(again.executed) > 3, (
                number,
                make.__name__,
            )
        else:
            latent(server, server.run(rng.choice(GOOD)(100 + number)))
    return warm, Held.of(server)


def forget_runs(server: Server) -> None:
    shutil.rmtree(server.base / "user" / "flowcache" / "runs", ignore_errors=True)


def chunks_told(text: str) -> int:
    """How many chunks a line of progress says are finished."""
    words = text.split()
    return int(words[1]) - 1 if words[:1] == ["chunk"] and words[2] == "of" else 0


def chunks_earlier(outcome: Outcome) -> int:
    """Chunks that a run took from an interrupted one, by its report."""
    texts = [text for each in outcome.outputs.values() for text in (each or {}).get("text", ())]
    lines = [line for text in texts for line in text.splitlines()]
    return next((int(line.split()[0]) for line in lines if "from an interrupted run" in line), 0)


def killed(server: Server, graph: Graph, seconds: float) -> int:
    """Kills a server so long after a run began; gives the chunks that it had told as finished."""
    told, begun = 0, threading.Event()

    def listen(kind: str, data) -> None:
        nonlocal told
        begun.set()
        if kind == "binary" and data[:4] == b"\0\0\0\3":
            size = int.from_bytes(data[4:8], "big")
            told = max(told, chunks_told(data[8 + size :].decode()))

    def kill() -> None:
        begun.wait()
        time.sleep(seconds)
        server.process.kill()

    threading.Thread(target=kill, daemon=True).start()
    try:
        server.run(graph, on_event=listen)
    except (ConnectionError, OSError):
        pass
    server.process.wait()
    return told


def check_kills(folder: Path, times: int) -> list[int]:
    """Kills as many servers, each a little later after its run began; the next server must go on with it to the same
    bits, with all chunks that were told as finished.

    Returns:
        The chunks that were there after each kill.
    """
    server = start(folder)
    begun = time.monotonic()
    expected = latent(server, server.run(kept(500, resume=False)))
    whole, earlier = time.monotonic() - begun, []
    for number in range(times):
        forget_runs(server)
        told = killed(server, anew(kept(500), number), number / times * whole)
        server = start(folder)
        outcome = server.run(anew(kept(500), number))
        assert torch.equal(latent(server, outcome), expected), number
        earlier.append(chunks_earlier(outcome))
        assert earlier[-1] >= told, f"kill {number}: {told} chunks were told as finished, {earlier[-1]} were there"
        stream = next(name for name in outcome.outputs if "images" in (outcome.outputs[name] or {}))
        assert len(frames_of(server.saved(outcome, stream)[0])) == 61, number
    server.stop()
    return earlier


def check_clients(server: Server, prompts: int) -> int:
    """Two clients send as many prompts each, at once; each must get its own results, right to the bit.

    Returns:
        How many results were compared.
    """
    expected = {make: latent(server, server.run(make(77))) for make in GOOD}

    def client(number: int) -> int:
        rng = random.Random(number)
        for prompt in range(prompts):
            make = rng.choice(GOOD)
            ours = latent(server, server.run(anew(make(77), 1 + 2 * prompt + number)))
            assert torch.equal(ours, expected[make]), (number, prompt, make.__name__)
        return prompts

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(client, range(2)))


def check_clock(server: Server, jumps: int) -> int:
    """The clock jumps by up to a year, forwards and back, in the middle of kept runs that are interrupted and go on.

    Returns:
        How many runs went on with chunks that were there.
    """
    rng, expected, went_on = random.Random(0), latent(server, server.run(kept(600, resume=False))), 0
    for number in range(jumps):
        forget_runs(server)
        graph = anew(kept(600), number)
        interrupted(server, graph, rng.randint(20, 140))
        set_up(server, clock=rng.choice((-1, 1)) * rng.choice((1, DAY, 365 * DAY)))
        outcome = server.run(graph)
        assert torch.equal(latent(server, outcome), expected), number
        assert not any("-" in text.split("\n")[0] for _, text in outcome.texts), "a time below zero"
        went_on += chunks_earlier(outcome) > 0
    set_up(server)
    return went_on


def check_exceptions(server: Server, times: int) -> int:
    """A step of the network fails, at a random one; the next prompts must be right to the bit.

    Returns:
        How many runs failed.
    """
    rng, failed = random.Random(0), 0
    expected = {make: latent(server, server.run(make(77))) for make in GOOD}
    whole = latent(server, server.run(kept(700, resume=False)))
    for number in range(times):
        forget_runs(server)
        graph = anew(kept(700), number)
        set_up(server, fails_after=rng.randint(1, 60))
        outcome = server.run(graph)
        set_up(server)
        make = rng.choice(GOOD)
        assert torch.equal(latent(server, server.run(anew(make(77), 1 + number))), expected[make]), make.__name__
        if outcome.error is not None:
            assert "a step fails" in outcome.error["exception_message"], outcome.error["exception_message"]
            assert torch.equal(latent(server, server.run(graph)), whole), number
            failed += 1
    return failed


def check_captions(server: Server, count: int) -> tuple[int, Held, Held]:
    """Sends so many captions of 60 kB, as fast as one client can, to one run; with what it showed a second run must
    have the same bits.

    Returns:
        How many were shown, and what the server held after a fifth of the captions and after the last.
    """

    def steered(positive: Callable[[Graph], str], chunks: int) -> tuple[Graph, str]:
        graph = Graph()
        node = extend(graph, 5, chunks, budget=2, lag=4)
        graph[node]["inputs"]["positive"] = [positive(graph), 0]
        graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
        return graph, graph.add("PreviewAny", source=(node, 3))

    held: list[Held] = []

    def send(told: dict) -> None:
        for number in range(count):
            words = "a blue square" if number % 2 else "a green triangle"
            body = {"prompt_id": told["prompt_id"], "node_id": told["node"], "text": words + " " * 60_000, "blend": 3}
            server.post("/flowcache/live", body)
            if number + 1 in (count // 5, count):
                held.append(Held(Usage.of(server), Counter(), resident(server)))
        server.post("/flowcache/live", {"prompt_id": told["prompt_id"], "node_id": told["node"], "stop": True})

    threads: list[threading.Thread] = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "flowcache.live" and data["running"] and not threads:
            threads.append(threading.Thread(target=send, args=(data,)))
            threads[0].start()

    live = lambda graph: graph.add("FlowCacheLivePrompt", text="a red circle", blend=0)  # noqa: E731
    graph, shown = steered(live, 10_000)
    outcome = server.run(graph, timeout=3600, on_event=on_event)
    made = latent(server, outcome)
    threads[0].join()
    text, chunks = outcome.outputs[shown]["text"][0], made.shape[2] // 2
    over_time = lambda graph: graph.add("FlowCachePromptsOverTime", text=text)  # noqa: E731
    assert torch.equal(latent(server, server.run(steered(over_time, chunks)[0], timeout=3600)), made)
    return len(text.splitlines()), *held


def tell_captions(server: Server, count: int) -> None:
    lines, warm, end = check_captions(server, count)
    print(f"{count} captions, {lines} lines of prompts: {warm.usage}, then {end.usage}; the same bits in a second run")
    print(f"more than after a fifth: {end.grown(warm)}", flush=True)


def tell_prompts(server: Server, prompts: int) -> None:
    warm, end = soak(server, prompts)
    growth = end.usage.memory / warm.usage.memory - 1
    print(f"after prompt {WARM}: {warm.usage}\nat the end: {end.usage}\nmemory grew by {growth:.2%}")
    print(f"more than after prompt {WARM}: {end.grown(warm)}", flush=True)
    assert growth <= MOST_GROWTH, f"memory grew by {growth:.2%}, at most {MOST_GROWTH:.0%} is allowed"


def tell_interrupts(server: Server, times: int) -> None:
    ended = check_interrupts(server, times)
    print(f"{times} interrupts, {ended} ended a run; every next prompt right to the bit", flush=True)


def tell_clients(server: Server, prompts: int) -> None:
    print(f"two clients: {check_clients(server, prompts)} results, each right to the bit", flush=True)


def tell_clock(server: Server, jumps: int) -> None:
    went_on = check_clock(server, jumps)
    print(f"{jumps} jumps of the clock, {went_on} runs went on; every result right to the bit", flush=True)


def tell_exceptions(server: Server, times: int) -> None:
    failed = check_exceptions(server, times)
    print(
        f"{times} runs with a failing step, {failed} failed; this run and the next prompt right to the bit",
        flush=True,
    )


ON_ONE_SERVER: dict[str, Callable[[Server, int], None]] = {
    "prompts": tell_prompts,
    "interrupts": tell_interrupts,
    "clients": tell_clients,
    "clock": tell_clock,
    "exceptions": tell_exceptions,
    "captions": tell_captions,
}
COUNTS = {
    "prompts": 200,
    "interrupts": 100,
    "kills": 40,
    "clients": 20,
    "clock": 20,
    "exceptions": 20,
    "captions": 5000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *COUNTS], help="all of them where none is named")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the servers: on a busy machine threads wait for each other
    for name in options.parts or COUNTS:
        count, begun = getattr(options, name), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if name == "kills":
                there = check_kills(Path(folder), count)
                print(f"{count} kills, with {there} chunks there afterwards; every run went on to the same bits")
            else:
                server = start(Path(folder))
                try:
                    ON_ONE_SERVER[name](server, count)
                finally:
                    server.stop()
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
