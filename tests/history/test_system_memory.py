"""A history in system memory: by choice, and chunk by chunk where the device runs out of its own. Same bits.

The device is the CPU, told when it has run out.
"""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowcache_core.history import cache as history_cache
from flowcache_core.history import room as memory
from flowcache_core.history.offload import Attempt, OffloadableBuffer
from flowcache_core.history.positions import Positions
from flowcache_core.history.room import RESERVE
from flowcache_core.models.wan import WanBackbone
from tests.helpers.histories import (
    CASES,
    OF_CASES,
    Case,
    a_chunk,
    cramped,
    engine,
    fails_at,
    histories,
    latents,
    on_device,
    room,
)
from tests.helpers.tiny import tiny_network


def note(chunks: int, capacity: int) -> str:
    return (
        f"too little device memory: {chunks} of {capacity} chunks of history are in system memory, oldest first, which "
        "is slower; a history budget makes it smaller"
    )


@OF_CASES
def test_history_may_live_in_system_memory(backbone, case):
    expected = latents(engine(backbone, case))
    made = engine(backbone, replace(case, kept=replace(case.kept, memory="system")))
    assert torch.equal(latents(made), expected) and not made.report.notes
    assert not any(on_device(each) for each in histories(made))
    assert not any(each.chunks_moved for each in histories(made))


@OF_CASES
@pytest.mark.parametrize("chunks", [1, 2, "all"])
def test_no_more_chunks_move_than_must(backbone, case, chunks):
    plain = engine(backbone, case)
    expected = latents(plain)
    capacity = room(histories(plain)[0])
    chunks = capacity if chunks == "all" else chunks
    made = cramped(backbone, case, chunks)
    assert torch.equal(latents(made), expected)
    assert made.report.notes == [note(chunks, capacity)]
    assert [each.chunks_moved for each in histories(made)] == [chunks] * len(histories(made))
    for each, its in zip(histories(made), histories(plain), strict=True):
        stored = [sum(part.nbytes for layer in one.layers for part in layer) for one in (each, its)]
        assert stored[0] == stored[1] and each.clean == its.clean
        assert all(torch.equal(part, other) for part, other in zip(each.save(), its.save(), strict=True))


@OF_CASES
@pytest.mark.parametrize("share", [0.7, 0.99])
def test_what_the_plan_finds_no_room_for_does_not_begin_on_the_device(backbone, monkeypatch, case, share):
    plain = engine(backbone, case)
    expected, plan = latents(plain), plain.forward.plan
    free = int(share * plan.device_bytes)
    monkeypatch.setattr(memory, "free_memory", lambda device: free + RESERVE)
    made = engine(backbone, case)
    moved = made.forward.plan.moved
    assert moved and [each.chunks_moved for each in histories(made)] == [moved] * plan.branches
    fits = [replace(plan, moved=count).device_bytes <= free for count in (moved - 1, moved)]
    assert fits == [False, True] or (moved == plan.movable_chunks and not any(fits))
    saved = sum(on_device(each) for each in histories(plain)) - sum(on_device(each) for each in histories(made))
    given = plan.given_tokens * a_chunk(histories(plain)[0]) // plan.chunk_tokens
    assert saved == plan.branches * (given + moved * a_chunk(histories(plain)[0]))
    assert torch.equal(latents(made), expected)
    assert made.report.notes == [note(moved, room(histories(plain)[0]))]


@pytest.mark.parametrize("name", ["whole", "budget"])
def test_with_room_enough_nothing_moves_and_with_none_everything(backbone, monkeypatch, name):
    plan = engine(backbone, CASES[name]).forward.plan
    for free, moved in ((plan.device_bytes + RESERVE, 0), (0, plan.movable_chunks)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert engine(backbone, CASES[name]).forward.plan.moved == moved


class DriverError(RuntimeError):
    error_code = 2  # as torch.AcceleratorError has it


OUT = (
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    DriverError("CUDA error: unknown"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("Could not allocate tensor with 1 bytes. There is not enough GPU video memory available!"),
)


@pytest.mark.parametrize("error", OUT, ids=str)
def test_every_drivers_lack_of_memory_is_understood(backbone, monkeypatch, error):
    plain = engine(backbone, CASES["relative"])
    expected = latents(plain)
    monkeypatch.setattr(Positions, "_turned", fails_at({3}, Positions._turned, error))
    made = engine(backbone, CASES["relative"])
    assert torch.equal(latents(made), expected)
    assert made.report.notes == [note(1, room(histories(plain)[0]))]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_are_not_taken_for_it(backbone, monkeypatch, error):
    monkeypatch.setattr(Positions, "_turned", fails_at({3}, Positions._turned, error))
    with pytest.raises(type(error), match="memory"):
        latents(engine(backbone, CASES["relative"]))


@pytest.mark.parametrize("name", ["budget", "one at a time", "slots stay"])
def test_with_everything_moved_a_lack_of_memory_is_an_error(backbone, name):
    each = histories(engine(backbone, CASES[name]))[0]
    made = cramped(backbone, CASES[name], room(each) + 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        latents(made)
    assert not any(each.on_device for each in histories(made))


def test_queries_and_token_numbers_stay_on_the_device(backbone):
    made = cramped(backbone, CASES["budget"], 2)
    latents(made)
    for each in histories(made):
        assert each.queries.device == each.tokens.device == each.device and each.asked


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

    def __enter__(self):
        begin, end = Attempt.__enter__, Attempt.__exit__

        def __enter__(attempt):
            self.depth += 1
            begin(attempt)

        def __exit__(attempt, *error):
            self.depth -= 1
            return end(attempt, *error)

        self.patched = patch.multiple(Attempt, __enter__=__enter__, __exit__=__exit__)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patched.stop()


class AnyOperation(TorchDispatchMode):
    """The device runs out at one operation of a run's forwards, wherever it is in them; operations are counted."""

    def __init__(self, made, at: int = 0):
        super().__init__()
        self.at, self.seen = at, 0
        forward = made.forward.network

        def network(*args):
            with self:
                return forward(*args)

        made.forward.network = network

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen == self.at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **(kwargs or {}))


@cache
def with_memory_enough(case: Case) -> tuple[torch.Tensor, int, int]:
    """What a run makes; operations in its work that may be begun anew, and in its forwards."""
    with RunsOut(at=0) as attempts:
        made = engine(WanBackbone(tiny_network()), case)
        forwards = AnyOperation(made)
        return latents(made), attempts.seen, forwards.seen


@OF_CASES
@pytest.mark.parametrize("share", [0.02, 0.335, 0.715, 0.999])
def test_wherever_memory_runs_out_the_bits_are_the_same(backbone, case, share):
    """In a block of a layer, in the head, in a cut: what is begun anew leaves no trace."""
    expected, operations, _ = with_memory_enough(case)
    with RunsOut(at=1 + int(share * operations)) as mode:
        made = engine(backbone, case)
        result = latents(made)
    assert mode.seen > mode.at and torch.equal(result, expected)
    assert 1 in {each.chunks_moved for each in histories(made)}


@pytest.mark.parametrize("name", ["whole", "budget", "relative", "one at a time", "lead and end, relative"])
@pytest.mark.parametrize("share", [0.0, 0.29, 0.6, 0.97])
def test_no_part_of_a_forward_is_left_out(backbone, name, share):
    expected, _, operations = with_memory_enough(CASES[name])
    for further in range(3):
        made = engine(backbone, CASES[name])
        AnyOperation(made, at=1 + int(share * operations) + further)
        assert torch.equal(latents(made), expected)
        assert 1 in {each.chunks_moved for each in histories(made)}


@pytest.mark.parametrize("name", ["budget", "relative", "one at a time", "slots stay, relative"])
@pytest.mark.parametrize("call", [0, 2, 3, 6])
def test_a_cut_that_runs_out_goes_on_where_it_was(backbone, monkeypatch, name, call):
    plain = engine(backbone, CASES[name])
    expected = latents(plain)
    monkeypatch.setattr(history_cache, "evict", fails_at({call}, history_cache.evict))
    made = engine(backbone, CASES[name])
    assert torch.equal(latents(made), expected)
    assert made.report.notes == [note(1, room(histories(plain)[0]))]


@pytest.mark.parametrize("name", ["one at a time", "slots stay"])
def test_a_cut_that_needs_the_other_branchs_memory_goes_on_where_it_was(backbone, monkeypatch, name):
    plain = engine(backbone, CASES[name])
    expected, capacity = latents(plain), room(histories(plain)[0])
    out = {call for call in range(3, 3 + capacity + 1)}  # all chunks of one, and once more with nothing left
    monkeypatch.setattr(history_cache, "evict", fails_at(out, history_cache.evict))
    made = engine(backbone, CASES[name])
    assert torch.equal(latents(made), expected)
    assert sorted(each.chunks_moved for each in histories(made)) == [1, capacity]


@pytest.mark.parametrize("name", ["lead and end, relative", "relative", "slots stay, relative"])
@pytest.mark.parametrize("call", [0, 3, 10])
def test_a_layer_that_runs_out_while_it_is_read_is_read_again(backbone, monkeypatch, name, call):
    expected = latents(engine(backbone, CASES[name]))
    monkeypatch.setattr(Positions, "_turned", fails_at({call}, Positions._turned))
    made = engine(backbone, CASES[name])
    assert torch.equal(latents(made), expected) and made.report.notes


@pytest.mark.parametrize("name", ["budget", "one at a time"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_history_that_finds_no_room_is_made_partly_in_system_memory(backbone, monkeypatch, name, share):
    plain = engine(backbone, CASES[name])
    expected, capacity = latents(plain), room(histories(plain)[0])
    chunks, make = round(share * capacity), OffloadableBuffer.empty

    def making(size, moved, *args):
        if sum(moved) < chunks * size[2] // capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return make(size, moved, *args)

    monkeypatch.setattr(OffloadableBuffer, "empty", making)
    made = engine(backbone, CASES[name])
    assert torch.equal(latents(made), expected)
    assert made.report.notes == ([note(chunks, capacity)] if chunks else [])
    assert all(on_device(each) == (capacity - chunks) * a_chunk(each) for each in histories(made))


def test_a_state_goes_on_in_either_memory(backbone):
    case, results = CASES["relative"], []
    plain, moved = engine(backbone, case), cramped(backbone, case, 2)
    latents(plain), latents(moved)
    for saved in (plain.save(), moved.save()):
        for made in (engine(backbone, case, loaded=saved), cramped(backbone, case, 2, loaded=saved)):
            results.append(latents(made))
    assert all(torch.equal(result, results[0]) for result in results)


def numbered(*pieces: int) -> tuple[OffloadableBuffer, torch.Tensor]:
    """A buffer whose first pieces have moved, and the same as one tensor."""
    whole = torch.arange(2 * 3 * 12 * 4).float().view(2, 3, 12, 4)
    buffer = OffloadableBuffer(whole.clone())
    for size in pieces:
        buffer.move(size)
    return buffer, whole


@pytest.mark.parametrize("pieces", [(), (5,), (2, 3, 4), (6, 6), (13,)])
@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 2), (1, 6), (5, 9), (11, 12), (4, 4)])
def test_a_buffer_in_pieces_is_the_same_buffer(pieces, first, last):
    buffer, whole = numbered(*pieces)
    assert buffer.tokens_moved == min(12, sum(pieces)) and buffer.here.shape[2] == 12 - buffer.tokens_moved
    assert torch.equal(buffer.read(first, last), whole[:, :, first:last])
    new = -torch.rand(2, 3, last - first, 4)
    buffer.write(first, new)
    whole[:, :, first:last] = new
    assert torch.equal(buffer.read(0, 12), whole) and buffer.nbytes == whole.nbytes


def test_what_has_not_moved_is_read_without_a_copy():
    buffer, _ = numbered()
    assert buffer.read(2, 9).untyped_storage().data_ptr() == buffer.here.untyped_storage().data_ptr()


def test_what_finds_no_way_back_stays_in_system_memory():
    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies = function is torch.ops.aten._to_copy.default
            self.made += copies
            if copies and self.made == 2:  # the first one is of no tokens
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return function(*args, **(kwargs or {}))

    buffer, whole = numbered()
    with Copies() as copies:
        buffer.move(4)
    assert copies.made == 2 and not buffer.here.shape[2]
    assert [piece.shape[2] for piece in buffer.moved] == [4, 8] and torch.equal(buffer.read(0, 12), whole)
