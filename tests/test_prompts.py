"""Prompts over time: which chunk shows what, and what is said about lines that cannot be read."""

import time
from contextlib import suppress

import pytest
import torch

from flowcache_core.errors import UserError
from flowcache_core.prompts import Blend, begins_shot, captions, mix, parse


def shown(text: str, chunk: int) -> dict[str, float]:
    (span,) = [span for span in parse(text) if span.first <= chunk <= span.last]
    return dict(span.at(chunk))


def test_every_chunk_has_exactly_one_span():
    text = "2-4: a\n\n# a note\n7: b\n9-11: c | d *3"
    assert [shown(text, chunk) for chunk in (0, 4, 7, 9, 11, 500)] == [
        {"a": 1}, {"a": 1}, {"b": 1}, {"c": 0.25, "d": 0.75}, {"c": 0.25, "d": 0.75}, {"c": 0.25, "d": 0.75},
    ]  # fmt: skip


def test_chunks_between_segments_blend():
    text = "0-1: a\n4-: b"
    assert shown(text, 2) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert shown(text, 3) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert shown("0-1: a\n2-: b", 2) == {"b": 1}


def test_weights_add_up_to_one_through_blends():
    for chunk in range(12):
        assert sum(shown("0: a *2 | b\n5-6: c | a\n10: d", chunk).values()) == pytest.approx(1)


def test_a_caption_may_hold_colons_and_stars():
    assert shown("0: a title: one * two *2 | b *2", 0) == {"a title: one * two": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("0-4: 16:9 film of a cat", {"16:9 film of a cat": 1}),
        ("0-4:16:9", {"16:9": 1}),
        ("0: a **very big** dog", {"a **very big** dog": 1}),
        ("0: a *big* dog | a **cat**", {"a *big* dog": 0.5, "a **cat**": 0.5}),
        ("0: a **bold** dog *3 | b", {"a **bold** dog": 0.75, "b": 0.25}),
        ("0: a {red} cat", {"a {red} cat": 1}),
        ('0: a sign that says "a | b" *3 | c', {'a sign that says "a | b"': 0.75, "c": 0.25}),
        ('0: "{red|blue}"', {'"{red|blue}"': 1}),
        ("0: “a|b*2”", {"“a|b*2”": 1}),
        ('0: a 5" screen | a cat', {'a 5" screen': 0.5, "a cat": 0.5}),
        (r"0: a \| b \*2", {"a | b *2": 1}),
        (r"0: C:\films | b", {r"C:\films": 0.5, "b": 0.5}),
        ("０－４：红色的圆 ＊３ ｜ 蓝色：方块", {"红色的圆": 0.75, "蓝色：方块": 0.25}),
        ("0–4: a *0,75 | b *0,25", {"a": 0.75, "b": 0.25}),
        ("0: a grid of 2 x 3 *1", {"a grid of 2 x 3": 1}),
        ("0: a grid of 2\\*3", {"a grid of 2*3": 1}),
    ],
)
def test_signs_mean_what_a_person_means(line, expected):
    assert shown(line, 0) == pytest.approx(expected)


def test_one_caption_is_its_embedding_to_the_bit_and_mixes_are_sums():
    embeddings = {"a": torch.randn(1, 3, 4), "b": torch.randn(1, 5, 4)}
    assert mix(embeddings, {"a": 1.0}) is embeddings["a"]
    both = mix(embeddings, {"a": 0.25, "b": 0.75})
    assert both.shape == (1, 5, 4)
    assert torch.allclose(both[:, :3], 0.25 * embeddings["a"] + 0.75 * embeddings["b"][:, :3])
    assert torch.allclose(both[:, 3:], 0.75 * embeddings["b"][:, 3:])
    assert captions(parse("0: b\n1: a\n2-: b")) == ["b", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "0" + 24_000 * " " + "a",
        "0 -" + 24_000 * " ",
        "0: " + 24_000 * "*" + "a b c",
        "0: a" + 12_000 * "* ",
        "0: a *" + 24_000 * "1",
        "0: " + 24_000 * "|",
        "0: " + 24_000 * '"',
        "0: " + 24_000 * "“",
        "0: " + 12_000 * "\\|",
        "0: {" + 24_000 * "|",
        "0: " + 24_000 * "{",
        24_000 * "-" + ":",
    ],
)
def test_a_long_text_is_read_or_refused_at_once(text):
    begun = time.process_time()
    with suppress(UserError):
        parse(text)
    assert time.process_time() - begun < 0.2


def test_blends_take_no_more_than_their_lines_do():
    text = "\n".join(f"{100_000 * number}: {'ab'[number % 2]}" for number in range(1000))
    spans = parse(text)
    assert len(spans) == 1999 and shown("0: a\n100000: b", 25_000) == {"a": 0.75, "b": 0.25}


def test_a_blend_is_mixed_when_it_is_asked_for():
    red, blue = torch.ones(1, 2, 4), torch.zeros(1, 3, 4)
    span = parse("0: a\n4-: b")[1]
    blend = Blend(span, {"a": red, "b": blue}, red)
    assert torch.allclose(blend.at(1)[:, :2], 0.75 * red) and blend.at(3).shape == (1, 3, 4)
    assert span.nearest == [(1, 2, {"a": 1.0}), (3, 3, {"b": 1.0})]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no prompts"),
        ("a red circle", "Line 1"),
        ("0-4: a\n3-: b", "Line 2 begins at chunk 3"),
        ("0-: a\n5: b", "holds to the end"),
        ("4-2: a", "smaller number first"),
        ("0: a *0.x", "weight '0.x'"),
        (
            "0: a\n16:9 film of a cat",
            "Line 2 begins with '16:9', a ratio or a chunk's number",
        ),
        ("3：4 shot", "Line 1 begins with '3：4'"),
        ("0: a {red|blue} cat", "Line 1 has the choice '{red|blue}'"),
        ("0: a cat\n1: {a {b|c}} | d", "Line 2 has the choice '{b|c}'"),
        ("0: a grid of 2*3", "ends with '2\\*3', a product or a weight"),
        ("0: a *0", "add up to 0"),
        (f"{9 * '1'}1: a", "Line 1 names chunk 1111111111"),
        (f"0: a\n1-{5000 * '9'}: b", "Line 2 names chunk 999"),
        ("0: " + "|".join(map(str, range(1001))), "1001 different captions"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_a_segment_that_begins_a_shot_tells_its_first_chunk_alone():
    spans = parse("0-2: a fox\n3-5: The scene transitions. a den\n8: The scene transitions. a hill\n9-: a hill")
    shown = {chunk: dict(span.weights) for span in spans for chunk in range(span.first, min(span.last, 12) + 1)}
    assert shown[2] == {"a fox": 1.0} and shown[4] == shown[5] == {"a den": 1.0} and shown[12] == {"a hill": 1.0}
    begun = [chunk for chunk, weights in shown.items() if begins_shot(weights)]
    assert begun == [3, 8] and shown[3] == {"The scene transitions. a den": 1.0}
    assert parse("0-: The scene transitions.")[0].last > 12  # nothing is behind it


@pytest.mark.parametrize("text", ["the scene transitions. a den", "a den. The scene transitions. a fox", "a | b"])
def test_only_these_words_at_the_beginning_are_a_cut(text):
    assert not begins_shot(parse(f"0: {text}")[0].weights)
