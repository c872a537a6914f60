"""The side stream, on a pretended device that does what it is given there as late as it may."""

from dataclasses import replace

import pytest
import torch

from flowcache_core import generate
from flowcache_core.history import streams
from flowcache_core.history.offload import OffloadableBuffer
from flowcache_core.history.streams import AT_ONCE, SideStream
from flowcache_core.models.presets import describe, preset
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import OFF
from flowcache_core.storage.state import State
from tests.helpers import tiny
from tests.helpers.histories import CASES, OF_CASES, cramped, engine, histories, latents
from tests.helpers.late_device import RUBBISH, Device, pretend_streams

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch) -> Device:
    """The CPU, with streams."""
    return pretend_streams(streams, monkeypatch.setattr)


def test_work_waits_for_what_came_before_and_is_waited_for(device):
    side, given, copy = SideStream(CPU), torch.ones(3), torch.zeros(3)
    pending = side.run(lambda: copy.copy_(given), [given])
    assert device.told == ["side waits", "side begins", "kept 1", "event"]
    assert copy.tolist() == [RUBBISH] * 3
    assert torch.equal(pending.on_device(), given) and device.told[4:] == ["current waits", "kept 1"]


def test_the_host_waits_for_a_copy(device):
    pending = SideStream(CPU).to_cpu(torch.ones(3))
    assert torch.equal(pending.on_cpu(), torch.ones(3)) and device.told[-1] == "host waits"


def test_host_work_is_left_for_later_and_done_in_order(device):
    side, done = SideStream(CPU), []
    side.later(lambda: done.append(1))
    side.later(lambda: done.append(2))
    assert not done
    side.settle()
    side.settle()
    assert done == [1, 2]


def test_nobody_waits_for_what_goes_on_beside(device):
    side, copy = SideStream(CPU), torch.zeros(3)
    with side.beside():
        copy.copy_(torch.ones(3))
        found = side.to_cpu(copy)
    assert not found.there and "host waits" not in device.told and "current waits" not in device.told
    assert found.on_cpu().tolist() == [1] * 3 and found.there


def test_without_a_switch_or_without_streams_there_is_none(device, monkeypatch):
    off = SideStream(CPU, on=False)
    monkeypatch.undo()
    for side in (off, SideStream(CPU), AT_ONCE):
        done, given = [], torch.ones(3)
        side.later(lambda: done.append(1))
        copy = side.run(lambda: torch.zeros(3).copy_(given), [given])
        with side.beside():
            assert not side.overlaps and done == [1]
        assert torch.equal(copy.on_cpu(), given) and torch.equal(copy.on_device(), given)
        assert side.to_cpu(given).on_cpu() is given
    assert not device.told and not device.streams


@OF_CASES
@pytest.mark.parametrize("chunks", [1, 2, "system"])
def test_moved_history_comes_back_a_layer_ahead_to_the_same_bits(device, monkeypatch, case, chunks):
    monkeypatch.setattr(tiny, "TINY", replace(tiny.TINY, num_layers=3))
    backbone = WanBackbone(tiny.tiny_network())
    expected = latents(engine(backbone, case, overlap=False))
    assert not device.streams
    if chunks == "system":
        made = engine(backbone, replace(case, kept=replace(case.kept, memory="system")))
    else:
        made = cramped(backbone, case, chunks)
    device.told.clear()
    assert torch.equal(latents(made), expected)
    if chunks == "system" or all(each.on_device for each in histories(made)):
        assert device.told.count("current waits") >= device.told.count("event") > 20
    else:  # where a lack of memory has moved everything, there is none to spare
        assert not device.told.count("event")
    off = engine(backbone, replace(case, kept=replace(case.kept, memory="system")), overlap=False)
    assert torch.equal(latents(off), expected)


def moved(*pieces: int) -> tuple[OffloadableBuffer, torch.Tensor]:
    whole = torch.rand(2, 3, 12, 4)
    buffer = OffloadableBuffer(whole.clone(), side=SideStream(CPU))
    for count in pieces:
        buffer.move(count)
    return buffer, whole


def test_a_fetched_buffer_is_not_read_before_it_is_there(device):
    (buffer, whole), (before, _) = moved(3, 4), moved(3, 4)
    buffer.fetch(7, before)
    assert torch.equal(buffer.read(8, 12), whole[:, :, 8:]) and "current waits" not in device.told  # none of it
    assert torch.equal(buffer.read(2, 12), whole[:, :, 2:]) and "current waits" in device.told


def test_room_on_the_device_goes_on_to_the_layer_after_the_next(device):
    (first, _), (second, whole), (nothing, _) = moved(3, 4), moved(3, 4), moved()
    first.fetch(7, nothing)
    room = [part.data_ptr() for part in first._ahead.on_device()]
    second.fetch(7, first)
    assert [part.data_ptr() for part in second._ahead.on_device()] == room and not first._ahead_tokens
    assert torch.equal(second.read(0, 12), whole)


def test_what_may_change_is_not_fetched(device):
    buffer, whole = moved(3, 4)
    buffer.fetch(6, moved()[0])
    assert buffer._ahead_tokens == 3
    buffer.write(3, whole[:, :, 8:])  # beside the fetched piece
    assert buffer._ahead_tokens == 3
    assert torch.equal(buffer.read(0, 7), torch.cat([whole[:, :, :3], whole[:, :, 8:]], dim=2))


@pytest.mark.parametrize("change", [lambda buffer: buffer.write(2, -torch.ones(2, 3, 4, 4)), lambda s: s.move(2)])
def test_what_changed_since_is_not_taken_from_the_fetched_copy(device, change):
    buffer, before = moved(3, 4)[0], moved()[0]
    buffer.fetch(7, before)
    change(buffer)
    expected = torch.cat([*buffer.moved, buffer.here], dim=2)
    assert torch.equal(buffer.read(0, 12), expected)


@pytest.mark.parametrize("case", ["whole", "budget", "relative"])
@pytest.mark.parametrize("moved_chunks", [0, 1])
def test_a_copy_of_the_history_is_of_when_it_was_begun(backbone, device, case, moved_chunks):
    """Although the run goes on before anybody looks at it: cuts, places keys anew, moves chunks."""
    made = cramped(backbone, CASES[case], moved_chunks) if moved_chunks else engine(backbone, CASES[case])
    copies = []
    for _ in made.run():
        for each in histories(made):
            with torch.inference_mode():
                copy = each.begin_save()
            copies.append((each.save(), copy))
        if len(copies) == 6:
            for each in histories(made):
                each.move_chunk()
    for saved, copy in copies:
        assert all(torch.equal(ours, its) for ours, its in zip(copy(), saved, strict=True))


def video(backbone, overlap: bool) -> tuple[torch.Tensor, State, list]:
    told = []
    text = torch.randn(1, 5, backbone.text_dim, generator=torch.Generator().manual_seed(0))
    result = generate(
        backbone,
        text,
        3,
        steps=4,
        lag=2,
        settings=replace(OFF, overlap=overlap),
        latent_size=(6, 4),
        on_progress=lambda progress: told.append(progress.tick),
        on_chunk=lambda chunk: told.append(f"chunk {chunk.number}"),
    )
    return result.latents, result.state, told


def test_chunks_are_handed_out_a_tick_later_and_the_same(backbone, device):
    plain, state, told = video(backbone, overlap=False)
    latent, its, later = video(backbone, overlap=True)
    assert torch.equal(latent, plain) and torch.equal(its.histories[0].keys, state.histories[0].keys)
    assert told == [1, 2, 3, 4, "chunk 0", 5, 6, "chunk 1", 7, 8, "chunk 2"]
    assert later == [1, 2, 3, 4, "chunk 0", 5, 6, "chunk 1", 7, 8, "chunk 2"]
    assert device.told.count("host waits") == 3


def test_the_switch_is_no_preset_of_its_own():
    settings = preset("fast", budget=3)
    assert describe(replace(settings, overlap=False)) == describe(settings)
