"""A history in system memory: by choice, and chunk by chunk where the device runs out of its own. Same bits.

The device is the CPU, told when it has run out.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowcache_core.engine import runner
from flowcache_core.history import cache as history
from flowcache_core.history.cache import History
from flowcache_core.history.offload import Stretch, spared
from flowcache_core.schedule import ChunkSchedule
from tests.helpers.histories import CASES, OF_CASES, a_chunk, cramped, engine, fails_at, histories, latents, on_device


def note(chunks: int, capacity: int) -> str:
    return (
        f"out of device memory: {chunks} of {capacity} chunks of history were moved to system memory, oldest first, "
        "which is slower; a history budget makes it smaller"
    )


@OF_CASES
def test_history_may_live_in_system_memory(backbone, case):
    expected = latents(engine(backbone, case))
    made = engine(backbone, replace(case, kept=replace(case.kept, memory="system")))
    assert torch.equal(latents(made), expected) and not made.runner.report.notes
    assert not any(on_device(each) for each in histories(made))


@OF_CASES
@pytest.mark.parametrize("chunks", [1, 3, "all"])
def test_no_more_chunks_move_than_must(backbone, case, chunks):
    expected = latents(engine(backbone, case))
    capacity = case.kept.capacity(ChunkSchedule(6, 4, 2))
    chunks = capacity if chunks == "all" else chunks
    made = cramped(backbone, case, chunks)
    assert torch.equal(latents(made), expected)
    assert made.runner.report.notes == [note(chunks, capacity)]
    assert [each.chunks_moved for each in histories(made)] == [chunks] * len(histories(made))
    plain = engine(backbone, case)
    latents(plain)
    for each, its in zip(histories(made), histories(plain), strict=True):
        assert each.bytes == its.bytes and each.bytes_used == its.bytes_used
        assert all(torch.equal(part, other) for part, other in zip(each.save(), its.save(), strict=True))


def test_with_everything_moved_a_lack_of_memory_is_an_error(backbone):
    made = cramped(backbone, CASES["budget"], 5)  # of 4
    with pytest.raises(torch.cuda.OutOfMemoryError):
        latents(made)
    assert not any(each.on_device for each in histories(made))


def test_queries_leave_the_device_last(backbone):
    made = cramped(backbone, CASES["budget"], 3)
    latents(made)
    assert all(each.queries_at == each.device and each.queries for each in histories(made))


class RunsOut(TorchDispatchMode):
    """Inside work that may be begun anew, the device runs out at one operation; operations are counted."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.seen, self.depth = at, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.depth:
            self.seen += 1
            if self.seen == self.at:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **(kwargs or {}))

    def spared(self, work, all_histories):
        def watched():
            self.depth += 1
            try:
                return work()
            finally:
                self.depth -= 1

        return spared(watched, all_histories)


@OF_CASES
@pytest.mark.parametrize("share", [0.02, 0.31, 0.335, 0.502, 0.68, 0.715, 0.9, 0.999])
def test_wherever_memory_runs_out_the_bits_are_the_same(backbone, monkeypatch, case, share):
    whole = RunsOut(at=0)
    for module in (history, runner):
        monkeypatch.setattr(module, "spared", lambda *args: mode.spared(*args))
    with whole as mode:
        expected = latents(engine(backbone, case))
    with RunsOut(at=1 + int(share * whole.seen)) as mode:
        made = engine(backbone, case)
        result = latents(made)
    assert mode.seen > mode.at and torch.equal(result, expected)
    assert 1 in {each.chunks_moved for each in histories(made)}


@pytest.mark.parametrize("call", [0, 2, 3, 11])
def test_a_cut_that_runs_out_goes_on_where_it_was(backbone, monkeypatch, call):
    expected = latents(engine(backbone, CASES["budget"]))
    monkeypatch.setattr(history, "gather", fails_at({call}, history.gather))
    made = engine(backbone, CASES["budget"])
    assert torch.equal(latents(made), expected) and made.runner.report.notes == [note(1, 4)]


def test_a_cut_that_needs_the_other_branchs_memory_goes_on_where_it_was(backbone, monkeypatch):
    expected = latents(engine(backbone, CASES["budget"]))
    out = {call for call in range(3, 3 + 5)}  # four chunks, and once more with nothing left
    monkeypatch.setattr(history, "gather", fails_at(out, history.gather))
    made = engine(backbone, CASES["budget"])
    assert torch.equal(latents(made), expected)
    assert sorted(each.chunks_moved for each in histories(made)) == [1, 4]


@pytest.mark.parametrize("call", [0, 3])
def test_positions_that_run_out_are_set_again(backbone, monkeypatch, call):
    case = CASES["lead and end, relative"]
    expected = latents(engine(backbone, case))
    monkeypatch.setattr(History, "_turn", fails_at({call}, History._turn))
    assert torch.equal(latents(engine(backbone, case)), expected)


@pytest.mark.parametrize("chunks", [0, 1, 3, 4])
def test_a_history_that_finds_no_room_is_made_partly_in_system_memory(backbone, monkeypatch, chunks):
    expected, made = latents(engine(backbone, CASES["budget"])), engine(backbone, CASES["budget"])
    make = Stretch.empty

    def making(size, moved, *args):
        if sum(moved) < chunks * size[2] // 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return make(size, moved, *args)

    monkeypatch.setattr(Stretch, "empty", making)
    assert torch.equal(latents(made), expected)
    assert made.runner.report.notes == ([note(chunks, 4)] if chunks else [])
    assert all(on_device(each) == (4 - chunks) * a_chunk(each) for each in histories(made))


def test_a_state_goes_on_in_either_memory(backbone):
    first = cramped(backbone, CASES["relative"], 2)
    latents(first)
    plain = engine(backbone, CASES["relative"])
    latents(plain)
    results = []
    for saved, chunks in ((plain, None), (first, 2)):
        case = CASES["relative"]
        made = engine(backbone, case) if chunks is None else cramped(backbone, case, chunks)
        made.runner.load(saved.runner.save())
        results.append(latents(made))
    assert torch.equal(*results)


def numbered(*pieces: int) -> tuple[Stretch, torch.Tensor]:
    """A stretch whose first pieces have moved, and the same as one tensor."""
    whole = torch.arange(2 * 3 * 12 * 4).float().view(2, 3, 12, 4)
    stretch = Stretch(whole.clone())
    for size in pieces:
        stretch.move(size)
    return stretch, whole


@pytest.mark.parametrize("pieces", [(), (5,), (2, 3, 4), (6, 6), (13,)])
@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 2), (1, 6), (5, 9), (11, 12), (4, 4)])
def test_a_stretch_in_pieces_is_the_same_stretch(pieces, first, last):
    stretch, whole = numbered(*pieces)
    heads = slice(1, 3)
    assert stretch.tokens_moved == min(12, sum(pieces)) and stretch.here.shape[2] == 12 - stretch.tokens_moved
    assert torch.equal(stretch.read(first, last, heads), whole[:, heads, first:last])
    new = -torch.rand(2, 2, last - first, 3)
    stretch.write(first, new, heads)
    whole[:, heads, first:last, :3] = new
    assert torch.equal(stretch.read(0, 12), whole) and stretch.nbytes == whole.nbytes


def test_what_has_not_moved_is_read_without_a_copy():
    stretch, _ = numbered()
    assert stretch.read(2, 9).untyped_storage().data_ptr() == stretch.here.untyped_storage().data_ptr()


def test_what_finds_no_way_back_stays_in_system_memory():
    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies = function is torch.ops.aten._to_copy.default
            self.made += copies
            if copies and self.made == 2:  # the first one is of no tokens
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return function(*args, **(kwargs or {}))

    stretch, whole = numbered()
    with Copies() as copies:
        stretch.move(4)
    assert copies.made == 2 and not stretch.here.shape[2]
    assert [piece.shape[2] for piece in stretch.moved] == [4, 8] and torch.equal(stretch.read(0, 12), whole)
