"""What Self-Forcing sees past the 21 frames that it was trained on: the table of docs/settings.md."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.history.rolling_sink import walked
from flowcache_core.settings import bounded_history
from tests.helpers.history_windows import FRAMES, make
from tests.helpers.runs import video

CHUNK, WINDOW = 20, 21
FIRST = CHUNK * FRAMES  # frame of the chunk
ROLLED = [walked(frame, 18) for frame in range(FIRST - 18, FIRST - 3)]


def seen_by_the_last(rule: str | None) -> tuple[list[int], int]:
    """Frames before the last chunk that it sees, and how far the farthest is by their positions."""
    history = bounded_history(None, None, 0) if rule is None else bounded_history(None, WINDOW, 0, rule=rule)
    engine = make(CHUNK + 1, history, steps=1)
    found = {}
    spare = engine.forward.spare[0]
    attend, turn = spare.attend, spare.positions.turn

    def watched(layer, chunk, *more, **named):
        clean = spare.tokens[layer, 0, 0, : spare.clean] // spare.plan.frame_tokens
        found["frames"] = clean.unique().tolist()
        found["chunk"] = chunk
        if not spare.positions.relative:
            found["farthest"] = (chunk + 1) * FRAMES - 1 - min(found["frames"], default=0)
        return attend(layer, chunk, *more, **named)

    def turned(keys, tokens, end, front=0):
        found["farthest"] = spare.positions.kept_places(tokens, end).unique().numel() + FRAMES - 1
        return turn(keys, tokens, end, front)

    spare.attend, spare.positions.turn = watched, turned
    video(engine)
    assert found["chunk"] == CHUNK
    return found["frames"], found["farthest"]


@pytest.mark.parametrize(
    ("rule", "frames", "farthest"),
    [
        (None, [*range(60)], 62),
        ("window", [*range(42, 60)], 20),
        ("deep sink", [*range(10), *range(52, 60)], 20),
        ("rolling sink", [*range(42, 60)], 20),  # where they stand; what is shown there is the beginning
    ],
)
def test_frames_that_chunk_20_sees(rule, frames, farthest):
    assert seen_by_the_last(rule) == (frames, farthest)


def test_what_a_rolling_sink_shows_chunk_20():
    assert ROLLED == [*range(6, 18), 17, 16, 15]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, 0), "needs a window in frames"),
        ((3, None, 0), "needs a window in frames"),
        ((None, 21, 3), "has its own sink"),
    ],
)
def test_a_deep_sink_without_what_it_needs(arguments, words):
    with pytest.raises(UserError, match=words):
        bounded_history(*arguments, rule="deep sink")
