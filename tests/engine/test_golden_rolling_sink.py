"""A window that shows the video's own beginning, against Rolling Sink's cache (tests/golden/README.md)."""

from dataclasses import replace

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.history.rolling_sink import walked
from flowcache_core.settings import Compression, HistorySettings, bounded_history
from tests.helpers.golden_runs import relative_error
from tests.helpers.history_windows import FRAMES, make
from tests.helpers.place import golden
from tests.helpers.runs import video

GOLDEN = golden("rolling_sink")
RUNS = {"rolling_sink": (10, 12), "rolling_sink_short": (9, 9)}  # chunks, and frames of the window


def rolling(window: int, **more) -> HistorySettings:
    return HistorySettings(window=window, compression=Compression("rolling sink"), relative=True, **more)


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    chunks, window = RUNS[name]
    expected = GOLDEN[f"{name}.final"]
    assert relative_error(video(make(chunks, rolling(window))), expected) < 1e-5
    plain = HistorySettings(window=window, compression=Compression("window"), relative=True)
    assert relative_error(video(make(chunks, plain)), expected) > 1e-2


def test_a_budget_in_chunks_says_the_same():
    budget = bounded_history(3, None, 0, Compression("rolling sink"), relative=True)
    assert torch.equal(video(make(10, budget)), video(make(10, rolling(12))))


@pytest.mark.parametrize("memory", ["auto", "system"])
@pytest.mark.parametrize("before", [2, 3, 4, 5, 7])
def test_it_goes_on_from_a_state(before, memory):
    """Before the window is full, as it is filled, and when it has turned round."""
    whole = video(make(9, rolling(9)))
    begun = make(before, rolling(9, memory=memory))
    first = video(begun)
    after = make(9 - before, rolling(9, memory=memory), loaded=begun.save(), done=before)
    assert relative_error(torch.cat([first, video(after)], dim=2), whole) < 1e-5


def check_walk(history, chunks: int, beginning: list[torch.Tensor], newest: list[torch.Tensor]) -> None:
    """The clean history of a run of so many chunks shows the beginning's values, then the newest chunk's."""
    plan, kept = history.plan, history.plan.clean_frames
    frames = [walked(frame, kept) for frame in range(chunks * FRAMES - kept, (chunks - 1) * FRAMES)]
    for layer, first, last in zip(history.layers, beginning, newest, strict=True):
        by_frame = first.unflatten(2, (kept, plan.frame_tokens))
        expected = torch.cat([by_frame[:, :, frames].flatten(2, 3), last], dim=2)
        assert torch.equal(layer.values.read(0, history.clean), expected)
    numbers = history.tokens[:, :, :, : history.clean] // plan.frame_tokens
    assert all(
        each.unique().tolist() == [*range(chunks * FRAMES - kept, chunks * FRAMES)] for each in numbers.flatten(0, 2)
    )


def test_it_goes_on_from_a_state_of_a_whole_history():
    begun = make(5, HistorySettings())
    video(begun)
    saved = begun.save()
    ((_, state),) = saved.items()
    history = make(4, rolling(9), done=5).forward.spare[0]
    history.load(state)
    tokens, values = history.plan.chunk_tokens, state.values
    check_walk(history, 5, [each[:, :, : 2 * tokens] for each in values], [each[:, :, -tokens:] for each in values])


def test_where_chunks_overlap_the_newest_finished_one_is_shown():
    engine = make(8, rolling(9), lag=2)
    video(engine)
    engine.save()
    (history,) = engine.forward.histories.values()
    first = [values.read(0, history.beginning.tokens) for _, values in history.beginning.layers]
    newest = [layer.values.read(history.clean - history.plan.chunk_tokens, history.clean) for layer in history.layers]
    check_walk(history, 8, first, newest)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_in_fewer_bits_it_is_nearly_the_same(kind):
    whole, packed = (video(make(9, rolling(9, type=each))) for each in ("as computed", kind))
    assert 0 < relative_error(packed, whole) < {"int8": 0.05, "int4": 0.5}[kind]


def test_what_is_kept_is_planned():
    engine = make(9, rolling(9))
    history = engine.forward.spare[0]
    plan = history.plan
    assert history.beginning.nbytes == plan.beginning_tokens * plan.token_bytes * plan.network.layers
    assert history.bytes * plan.branches == plan.history_bytes
    assert plan.history_bytes > replace(plan, beginning_frames=0).history_bytes


def test_the_walk_turns_round():
    assert [walked(frame, 3) for frame in range(10)] == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: HistorySettings(window=9, compression=Compression("rolling sink")), "use relative positions"),
        (lambda: Compression("rolling sink", sink=3), "no part of it can be told to stay"),
        (lambda: rolling(8).kept_frames(FRAMES), "whole chunks"),
        (lambda: rolling(6).kept_frames(FRAMES), "three at least"),
    ],
)
def test_what_it_cannot_do_is_told(make_it, words):
    with pytest.raises(UserError, match=words):
        make_it()
