"""MAGI-1 goes on from a run that was cut off, and from a lack of device memory, to the same bits."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from flowcache_core.engine.loop import Chunk, Engine
from flowcache_core.history.snapshot import Snapshot
from flowcache_core.models.magi.forward import MagiSampling, magi_schedule
from flowcache_core.models.magi.network import grouped_attention
from flowcache_core.settings import OFF
from flowcache_core.storage.run_folder import RunFolder
from tests.helpers.histories import fails_at, room
from tests.helpers.magi_runs import FRAMES, RUNS, magi_run
from tests.helpers.runs import video

NAME = "0123456789abcdef" * 2
ALL = MagiSampling(visible=())


def of_chunks(name: str, first: int, count: int, given: int, **more) -> Engine:
    """A run over so many chunks of a longer one."""
    schedule = magi_schedule((first + count) * FRAMES - given, RUNS[name][2], given)
    return magi_run(name, sampling=ALL, schedule=schedule, **more)


def keep(run: Engine, kept: RunFolder, finished: list[Chunk], last: int) -> None:
    """Keeps finished chunks up to a last one, when their keys are there."""
    while finished and run.settled:
        chunk = finished.pop()
        delta = run.begin_delta(full=not kept.begun)()
        if chunk.number <= last:
            kept.add(chunk, delta)


def rest(name: str, clean: Snapshot, first: int) -> list[torch.Tensor]:
    return [chunk.latent for chunk in of_chunks(name, first, 1, first * FRAMES, loaded=clean).run()]


@pytest.mark.parametrize(("name", "given"), [("short", 1), ("short_distill", 8)])
def test_a_run_that_is_cut_off_is_a_shorter_one(name, given, tmp_path):
    plain_run = magi_run(name, sampling=ALL)
    undisturbed = [chunk.latent for chunk in plain_run.run()]
    run = magi_run(name, sampling=ALL, kept="whole")
    first, finished = run.schedule.prefix, []
    kept = RunFolder(tmp_path, NAME, 2**30, first, FRAMES)
    run.on_progress = lambda told: keep(run, kept, finished, first + 1)
    for chunk, expected in zip(run.run(), undisturbed, strict=True):
        finished.append(chunk)
        assert torch.equal(chunk.latent, expected)  # keeping a chunk changes nothing
    assert run.report.clean_passes == plain_run.report.clean_passes  # the copies come from those of the run
    shorter = of_chunks(name, first, 2, given)
    list(shorter.run())
    (expected,) = shorter.save().values()
    state = RunFolder(tmp_path, NAME, 2**30, first, FRAMES).load()
    (clean,) = state.histories
    assert state.chunks == first + 2 and clean.keys.shape[3] == (first + 2) * FRAMES * 6
    assert all(torch.equal(ours, its) for ours, its in zip(clean[:3], expected[:3], strict=True))
    (ours,), (its,) = rest(name, clean, first + 2), rest(name, expected, first + 2)
    assert torch.equal(ours, its) and torch.isfinite(ours).all()


def test_a_chunk_is_kept_with_those_before_it_that_are_still_there(tmp_path):
    """Upstream's ranges drop older ones in the forward that the new chunk becomes clean in."""
    run, finished = magi_run("short", kept="whole"), []
    kept = RunFolder(tmp_path, NAME, 2**30, run.schedule.prefix, FRAMES)
    run.on_progress = lambda told: keep(run, kept, finished, 99)
    for chunk in run.run():
        finished.append(chunk)
    run.save()
    keep(run, kept, finished, 99)
    state = RunFolder(tmp_path, NAME, 2**30, run.schedule.prefix, FRAMES).load()
    tokens = state.histories[0].tokens
    assert state.chunks == run.schedule.total_chunks and tokens.shape[3] == 2 * FRAMES * 6
    assert torch.equal(tokens[0, 0, 0].long(), torch.arange(state.frames * 6)[-tokens.shape[3] :])


@cache
def plain(name: str) -> torch.Tensor:
    return video(magi_run(name))


@pytest.mark.parametrize(("name", "call"), [("short", 0), ("short", 40), ("short_distill", 7)])  # of attention
def test_a_forward_that_runs_out_of_memory_is_run_again(name, call):
    run = magi_run(name, attention=fails_at({call}, grouped_attention))
    assert torch.equal(video(run), plain(name))
    assert run.forward.history.chunks_moved == 1 and len(run.report.notes) == 1
    assert f"1 of {room(run.forward.history)} chunks" in run.report.notes[0]


def test_chunk_after_chunk_moves_until_nothing_is_left():
    expected = video(magi_run("short", sampling=ALL))
    run = magi_run("short", sampling=ALL, attention=fails_at({20, 21}, grouped_attention))
    assert torch.equal(video(run), expected)
    assert run.forward.history.chunks_moved == 2 and len(run.report.notes) == 1
    capacity = room(run.forward.history)
    run = magi_run("short", sampling=ALL, attention=fails_at(set(range(20, 20 + capacity)), grouped_attention))
    assert torch.equal(video(run), expected) and not run.forward.history.on_device
    run = magi_run("short", sampling=ALL, attention=fails_at(set(range(20, 21 + capacity)), grouped_attention))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(run.run())


def test_history_in_system_memory_by_choice():
    run = magi_run("short", replace(OFF, history=replace(OFF.history, memory="system")))
    assert torch.equal(video(run), plain("short"))
    assert not run.forward.history.on_device and not run.report.notes
