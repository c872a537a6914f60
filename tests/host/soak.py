"""Many prompts of mixed kind in one ComfyUI: what grows, what stays behind, and whether good prompts stay right.

As a script: python tests/host/soak.py --prompts 200 --interrupts 100
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.helpers.host.comfy_server import Outcome, Server  # noqa: E402
from tests.helpers.host.graph import Graph, native, random_network, write_network  # noqa: E402

NETWORK = "reliable.safetensors"
WARM = 20  # prompts after which memory must not grow any more


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


def prepare(server: Server) -> None:
    """Puts the small random network where the prompts look for it."""
    write_network(server.base / "models" / "diffusion_models" / NETWORK, random_network())


def extend(graph: Graph, seed: int, chunks: int = 2, preset: str = "balanced", budget: int = 0, **inputs) -> str:
    """A graph's Autoregressive Extend through the FlowCache node; gives the node."""
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name=NETWORK, family="causal", weight_type="default")
    model = graph.add("FlowCache", model=(loaded, 0), preset=preset, history_budget=budget)
    positive = graph.add("FlowCacheDemoPrompt", caption="a red circle")
    negative = graph.add("FlowCacheDemoPrompt", caption="")
    settings = dict(chunks=chunks, steps=4, guidance=1.0, frames_per_chunk=2, lag=2, width=64, height=64)
    return graph.add(
        "FlowCacheAutoregressiveExtend",
        model=(model, 0), positive=(positive, 0), negative=(negative, 0), seed=seed, **settings | inputs,
    )  # fmt: skip


def plain(seed: int) -> Graph:
    graph = Graph()
    graph.add("SaveLatent", samples=(extend(graph, seed), 0), filename_prefix="soak")
    return graph


def guided(seed: int) -> Graph:
    graph = Graph()
    node = extend(graph, seed, chunks=4, preset="paper fast", budget=1, guidance=3.0)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
    return graph


def extended(seed: int) -> Graph:
    graph = Graph()
    begun = extend(graph, seed)
    graph.add("SaveLatent", samples=(extend(graph, seed + 1, state=(begun, 1)), 0), filename_prefix="soak")
    return graph


def host_path(seed: int) -> Graph:
    graph = Graph()
    loaded = graph.add("UNETLoader", unet_name=NETWORK, weight_dtype="default")
    model = graph.add("FlowCache", model=(loaded, 0), preset="balanced", history_budget=1)
    graph.add("SaveLatent", samples=(native(graph, (model, 0), seed=seed), 0), filename_prefix="soak")
    return graph


def unfit(seed: int) -> Graph:
    """A state that was made with other chunks."""
    graph = Graph()
    begun = extend(graph, seed)
    node = extend(graph, seed, state=(begun, 1), frames_per_chunk=1)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="soak")
    return graph


GOOD: tuple[Callable[[int], Graph], ...] = (plain, guided, extended, host_path)


def anew(graph: Graph, number: int) -> Graph:
    """The same prompt in the eyes of the model, another one in those of the host's cache."""
    for node in graph.values():
        if node["class_type"] == "FlowCacheDemoPrompt":
            node["inputs"]["caption"] += " " * number
    return graph


def latent(server: Server, outcome: Outcome) -> torch.Tensor:
    """What a prompt saved."""
    assert outcome.error is None, outcome.error["exception_message"]
    (node,) = (name for name in outcome.outputs if "latents" in (outcome.outputs[name] or {}))
    (file,) = server.saved(outcome, node)
    return load_file(file)["latent_tensor"]


def interrupted(server: Server, graph: Graph, after: int) -> Outcome:
    """Runs a graph and interrupts it after so many of the server's messages."""
    seen = 0

    def count(kind: str, data) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            server.post("/interrupt", {})

    return server.run(graph, on_event=count)


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


def wait_for(server: Server, prompts: list[str], seconds: float = 300) -> list[str]:
    """How queued prompts ended: "success" or "error", in their order."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        known = server.get("/history")
        if all(prompt in known for prompt in prompts):
            return [known[prompt]["status"]["status_str"] for prompt in prompts]
        time.sleep(0.2)
    raise TimeoutError(f"{len(prompts)} prompts did not end in {seconds} s.")


def soak(server: Server, prompts: int, seed: int = 0) -> tuple[Usage, Usage]:
    """Runs prompts of mixed kind. Returns what the server holds after the warm-up and at the end."""
    rng = random.Random(seed)
    expected = {make: latent(server, server.run(make(77))) for make in GOOD}
    warm = Usage.of(server)
    for number in range(prompts):
        if number == WARM:
            warm = Usage.of(server)
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
    return warm, Usage.of(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            prepare(server)
            begun = time.monotonic()
            warm, end = soak(server, options.prompts)
            print(f"{options.prompts} prompts in {time.monotonic() - begun:.0f} s", flush=True)
            print(f"after prompt {WARM}: {warm}\nat the end: {end}")
            print(f"memory grew by {end.memory / warm.memory - 1:.2%}", flush=True)
            ended = check_interrupts(server, options.interrupts)
            print(f"{options.interrupts} interrupts, {ended} ended a run; every next prompt right to the bit")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
