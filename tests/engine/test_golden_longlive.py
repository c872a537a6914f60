"""Windows and sinks that count frames, against the caches of LongLive and Self-Forcing (tests/golden/README.md)."""

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.settings import Compression, HistorySettings
from tests.helpers.golden_runs import relative_error
from tests.helpers.history_windows import make
from tests.helpers.place import golden
from tests.helpers.runs import video

GOLDEN = golden("longlive")
SEEN = [tuple(map(int, name.split(".")[1:])) for name in GOLDEN if name.startswith("seen.")]


def window(frames: int, sink: int, share: float = 1.0, **more) -> HistorySettings:
    return HistorySettings(window=frames, compression=Compression("window", sink=sink, sink_share=share), **more)


RUNS = {
    "longlive": (6, window(12, 3)),
    "longlive_sink_1": (5, window(6, 1)),
    "longlive_uneven": (5, window(8, 2)),
    "longlive_infinity": (6, window(12, 3, relative=True)),
    "reward_forcing": (7, window(9, 3, 0.999, relative=True)),
    "reward_forcing_half": (7, window(9, 3, 0.5, relative=True)),
    "reward_forcing_12": (7, window(12, 3, 0.7, relative=True)),
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    found, expected = video(make(*RUNS[name])), GOLDEN[f"{name}.final"]
    assert relative_error(found, expected) < 1e-5
    chunks, history = RUNS[name]
    assert relative_error(video(make(chunks, window(history.window + 1, history.compression.sink))), expected) > 1e-2


@pytest.mark.parametrize("name", ["reward_forcing_half", "reward_forcing_12"])
def test_a_sink_that_takes_up_dropped_frames_is_no_fixed_one(name):
    chunks, history = RUNS[name]
    fixed = video(make(chunks, window(history.window, 3, relative=True)))
    assert relative_error(fixed, GOLDEN[f"{name}.final"]) > 1e-2


def test_a_sink_of_frames_is_no_sink_of_a_chunk():
    expected = GOLDEN["longlive_sink_1.final"]
    assert relative_error(video(make(5, window(6, 0))), expected) > 1e-2
    assert relative_error(video(make(5, window(6, 2))), expected) > 1e-2


@pytest.mark.parametrize(("frames_seen", "sink", "frames"), SEEN)
def test_frames_that_are_seen(frames_seen, sink, frames):
    """At every chunk and layer, in a step as in the clean pass."""
    expected = GOLDEN[f"seen.{frames_seen}.{sink}.{frames}"]
    engine = make(len(expected), window(frames_seen, sink), frames, steps=1)
    forward, found = engine.forward, []

    def looked(chunk: int, history, layer: int) -> None:
        start, end = history.slot(chunk)
        numbers = history.tokens[layer, :, :, :end] // history.plan.frame_tokens
        found.append((chunk, [each.unique().tolist() for each in numbers.flatten(0, 1)]))

    history = forward.spare[0]
    attend = history.attend
    history.attend = lambda layer, chunk, *more, **named: [
        attend(layer, chunk, *more, **named),
        looked(chunk, history, layer),
    ][0]
    video(engine)
    engine.save()
    assert len(found) == 2 * len(expected) * forward.plan.network.layers
    for chunk, heads in found:
        row = expected[chunk]
        assert heads == [row[row >= 0].tolist()] * len(heads)


def test_where_chunks_overlap_what_the_window_leaves_beside_one_chunk_is_kept():
    engine = make(6, window(8, 1), lag=2)
    video(engine)
    engine.save()
    (history,) = engine.forward.histories.values()
    assert history.clean == 5 * history.plan.frame_tokens
    kept = history.tokens[:, :, :, : history.clean] // history.plan.frame_tokens
    for each in kept.flatten(0, 2):
        assert each.unique().tolist() == [0, 14, 15, 16, 17]


@pytest.mark.parametrize(
    ("settings", "chunk_frames", "words"),
    [
        ({"window": 4}, 4, "leaves 0 frames"),
        ({"window": 6, "compression": Compression("window", sink=4)}, 3, "but 4 must stay"),
        ({"budget": 1, "compression": Compression("window", sink=4)}, 3, "but 4 must stay"),
    ],
)
def test_a_window_without_room(settings, chunk_frames, words):
    with pytest.raises(UserError, match=words):
        HistorySettings(**settings).kept_frames(chunk_frames)


def test_a_sink_that_takes_up_dropped_frames_goes_on_from_a_state():
    history = window(9, 3, 0.5, relative=True)
    whole = video(make(7, history))
    begun = make(4, history)
    first = video(begun)
    after = make(3, history, loaded=begun.save(), done=4)
    assert relative_error(torch.cat([first, video(after)], dim=2), whole) < 1e-5


def test_sinks_that_make_no_sense():
    with pytest.raises(UserError, match="relative positions"):
        window(9, 3, 0.5)
    with pytest.raises(UserError, match="needs the rule 'window'"):
        Compression(sink=3, sink_share=0.5)
    with pytest.raises(UserError, match="above 0 to 1"):
        Compression("window", sink=3, sink_share=0.0)
    with pytest.raises(UserError, match="as long as a chunk"):
        window(9, 2, 0.5, relative=True).kept_frames(3)
    with pytest.raises(UserError, match="as long as a chunk"):
        window(10, 3, 0.5, relative=True).kept_frames(3)


def test_windows_that_make_no_sense():
    with pytest.raises(UserError, match="leave one away"):
        HistorySettings(budget=2, window=6)
    with pytest.raises(UserError, match="at least 2"):
        HistorySettings(window=1)
    with pytest.raises(UserError, match="whole chunks by their score"):
        HistorySettings(window=9, compression=Compression(granularity="chunk"))
    with pytest.raises(UserError, match="sink is -1"):
        Compression(sink=-1)
