"""Captions that change while a run goes on: what is written reads as what was shown, to the bit."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.prompts import parse
from flowcache_core.timeline import LONGEST, Timeline


def read(text: str, chunk: int) -> list[tuple[str, float]]:
    """What Prompts over Time shows a chunk, in the order that embeddings are mixed in."""
    (span,) = [span for span in parse(text) if span.first <= chunk <= span.last]
    return list(span.at(chunk).items())


def test_a_change_holds_from_a_chunk_on():
    line = Timeline.begin("a").changed(4, "b").changed(5, "c").changed(5, "d")
    assert line.text() == "0-3: a\n4: b\n5-: d"
    assert line.until(5).text() == "0-3: a\n4-: b"
    assert line.changed(2, "a").text() == "0-: a"  # it would have changed to what is shown


def test_a_blend_that_another_change_cuts_reads_back_to_the_bit():
    line = Timeline.begin("a", 2).changed(5, "b", over=3).changed(7, "c", over=2).changed(8, "a")
    assert line.text().splitlines()[:3] == ["2-4: a", "5: a *0.75 | b *0.25", "6: a *0.5 | b *0.5"]
    cut = Timeline.begin("a").changed(1, "b", over=6).changed(4, "c", over=6)  # sevenths
    for each in (line, cut):
        assert Timeline.read(each.text()) == each
        for chunk in range(14):
            assert read(each.text(), chunk) == list(each.at(chunk).items())
            assert sum(each.at(chunk).values()) == 1.0


def test_a_video_that_goes_on_keeps_what_its_beginning_showed():
    before = Timeline.begin("a").changed(1, "b")
    assert Timeline.begin("c", 3, before).text() == "0: a\n1-2: b\n3-: c"
    assert Timeline.begin("c", 3, Timeline.begin("x", 3)).text() == "3-: c"


@pytest.mark.parametrize(
    "caption",
    ["", "16:9", "one | two", "2*3 *0.5", 'say "a | b"', "a\\b", "# 1", "两个 ｜ 三个＊2", "0-4: x", "é \u2028 {y}"],
)
def test_any_caption_reads_back_as_it_is(caption):
    line = Timeline.begin(caption).changed(1, "a", over=1)
    for chunk in range(3):
        assert read(line.text(), chunk) == list(line.at(chunk).items())
    assert list(line.at(0)) == [" ".join(caption.split())]


@pytest.mark.parametrize("caption", ["{a|b}", "a\\|b", "\ud800", "x" * (LONGEST + 1)])
def test_a_caption_that_cannot_be_written_is_refused(caption):
    with pytest.raises(UserError):
        Timeline.begin("a").changed(1, caption)


def test_captions_are_bounded():
    line = Timeline.begin("a")
    with pytest.raises(UserError, match="go on from its state"):
        for chunk in range(1, 1002):
            line = line.changed(chunk, f"caption {chunk}")


def test_only_a_record_is_read():
    for text in ("0-1: a\n4-: b", "# a\n0: b"):
        with pytest.raises(UserError):
            Timeline.read(text)


def test_a_caption_that_begins_a_shot_tells_its_first_chunk_alone_and_is_not_blended():
    line = Timeline.begin("a").changed(4, "The scene transitions. b", over=3)
    assert line.text() == "0-3: a\n4: The scene transitions. b\n5-: b"
    assert Timeline.read(line.text()) == line
    for chunk in range(8):
        assert read(line.text(), chunk) == list(line.at(chunk).items())
    assert read(line.until(5).text(), 6) == [("b", 1.0)]  # as it would have gone on
    again = line.changed(9, "The scene transitions. b")
    assert again.text().splitlines()[2:] == ["5-8: b", "9: The scene transitions. b", "10-: b"]
