"""A history in system memory: by choice, and where the device runs out of its own. The bits are the same."""

from dataclasses import replace
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

from flowcache_core import history
from flowcache_core.compression import Compression
from flowcache_core.engine import Engine, guidance
from flowcache_core.history import MOVED, History, HistorySettings
from flowcache_core.presets import OFF
from flowcache_core.runner import Runner
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.solvers import chunk_noise

KEPT = {"whole": HistorySettings(), "budget": HistorySettings(2), "relative": HistorySettings(2, relative=True)}


def text(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(seed))


def run(backbone, kept: HistorySettings, attention=F.scaled_dot_product_attention) -> tuple[torch.Tensor, Runner]:
    runner = Runner(backbone, ChunkSchedule(6, 4, 2), replace(OFF, history=kept), 2, attention=attention)
    engine = Engine(
        runner,
        guidance(runner, text(0), text(1), 2.0),
        [1.0, 0.8, 0.5, 0.2, 0.0],
        lambda chunk: chunk_noise(3, chunk, (1, TINY.in_dim, 2, 6, 4)),
    )
    return torch.cat([chunk.latent for chunk in engine.run()], dim=2), runner


def fails_at(calls: set[int], work):
    """`work`, which runs out of memory at some of its calls."""
    number = count()

    def working(*args, **kwargs):
        if next(number) in calls:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return work(*args, **kwargs)

    return working


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_history_may_live_in_system_memory(backbone, kept):
    expected, _ = run(backbone, kept)
    result, runner = run(backbone, replace(kept, memory="system"))
    assert torch.equal(result, expected) and not runner.report.notes
    assert all(each.in_system_memory for each in runner.histories.values())


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("call", [0, 1, 37, 110, 117])  # of attention: in the first forward, between, in a clean pass
def test_forward_that_runs_out_is_run_again(backbone, kept, call):
    expected, _ = run(backbone, kept)
    result, runner = run(backbone, kept, fails_at({call}, F.scaled_dot_product_attention))
    assert torch.equal(result, expected)
    assert runner.report.notes == [MOVED] and MOVED in runner.report.text()
    assert all(each.in_system_memory for each in runner.histories.values())


def test_second_failure_is_an_error(backbone):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(backbone, KEPT["budget"], fails_at({20, 21}, F.scaled_dot_product_attention))


def test_history_that_finds_no_room_is_made_in_system_memory(backbone, monkeypatch):
    expected, _ = run(backbone, KEPT["budget"])
    allocate, places = History._allocate, []

    def allocating(self, place):
        places.append(place)
        if len(places) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        allocate(self, place)

    monkeypatch.setattr(History, "_allocate", allocating)
    result, runner = run(backbone, KEPT["budget"])
    assert torch.equal(result, expected) and runner.report.notes == [MOVED]
    assert [each.in_system_memory for each in runner.histories.values()] == [True, False]


@pytest.mark.parametrize("call", [0, 2, 3, 11])
def test_compression_that_runs_out_goes_on_where_it_was(backbone, monkeypatch, call):
    expected, _ = run(backbone, KEPT["budget"])
    monkeypatch.setattr(history, "_gather", fails_at({call}, history._gather))
    result, runner = run(backbone, KEPT["budget"])
    assert torch.equal(result, expected) and runner.report.notes == [MOVED]
    assert any(each.in_system_memory for each in runner.histories.values())


@pytest.mark.parametrize("call", [0, 3])
def test_positions_that_run_out_are_set_again(backbone, monkeypatch, call):
    kept = HistorySettings(2, Compression("window"), relative=True)
    expected, _ = run(backbone, kept)
    monkeypatch.setattr(History, "_turn", fails_at({call}, History._turn))
    result, _ = run(backbone, kept)
    assert torch.equal(result, expected)
