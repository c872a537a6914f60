"""File name prefixes that would be shown otherwise than they are."""

import pytest

from flowcache_core.storage.files import clean_name


@pytest.mark.parametrize(
    ("prefix", "cleaned"),
    [
        ("flowcache/video", "flowcache/video"),
        ("a\nb/c\td", "a_b/c_d"),
        ("clip\u202e4pm", "clip4pm"),
        ("\u2067ab\u2069\u200f", "ab"),
        ("a\u2028b", "a_b"),
        ("", "x"),
        ("a / \u202e", "a /x"),
        ("folder/", "folder/x"),
        ("folder/.", "folder/x"),
        ("%date%/视频 1 \U0001f469\u200d\U0001f680", "%date%/视频 1 \U0001f469\u200d\U0001f680"),
    ],
)
def test_a_prefix_is_what_it_looks_like(prefix, cleaned):
    assert clean_name(prefix, "x") == cleaned
