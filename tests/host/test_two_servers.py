"""Two servers with the same folders for models, results and kept runs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.host.comfy_server import Server
from tests.helpers.host.graph import Graph
from tests.helpers.host.videos import frames_of
from tests.host.test_long import extend, fill, plain, resumable

CHUNKS, SEEDS = 3, (81, 82)


@pytest.fixture(scope="module")
def other(server):
    fill(server.base)
    running = Server(server.base, arguments=("--preview-method", "none"))  # as a server starts that is told nothing
    yield running
    running.stop()


def prompt(name: str, seed: int) -> tuple[Graph, str, str]:
    """A run that is streamed and kept, with the nodes that make it and save its latent."""
    graph = Graph()
    node = resumable(graph, CHUNKS, seed)
    return graph, node, graph.add("SaveLatent", samples=(node, 0), filename_prefix=name)


def test_the_same_and_other_prompts_at_the_same_time(server, other):
    expected = {seed: plain(server, CHUNKS, seed) for seed in SEEDS}

    def run(name: str, host: Server) -> list[tuple[torch.Tensor, Path]]:
        results = []
        for seed in SEEDS:
            graph, node, save = prompt(name, seed)
            outcome = host.run(graph)
            assert outcome.error is None, outcome.error["exception_message"]
            latent = load_file(host.saved(outcome, save)[0])["latent_tensor"]
            results.append((latent, host.saved(outcome, node)[0]))
        return results

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, ("one", "two"), (server, other)))
    for results in both:
        for seed, (latent, video) in zip(SEEDS, results, strict=True):
            assert torch.equal(latent, expected[seed])
            assert len(frames_of(video)) == CHUNKS * 8 - 3
    assert len({video for results in both for _, video in results}) == 4


def test_previews_come_unless_the_page_is_set_to_none(other):
    for seed, chosen, shown in ((83, "default", True), (84, "none", False)):
        graph = Graph()
        graph.add("SaveLatent", samples=(extend(graph, chunks=1, seed=seed), 0), filename_prefix="previews")
        outcome = other.run(graph, extra_data={"preview_method": chosen})
        assert outcome.error is None, outcome.error["exception_message"]
        assert bool(outcome.previews) == shown
