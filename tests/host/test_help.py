"""Every node has a help page and names and tooltips, in English and Chinese."""

import json
import re
import urllib.request

import pytest

from tests.helpers.host.node_texts import ENGLISH, inputs_of, node_texts, our_nodes

PAGES = ("{}.md", "{}/zh.md")  # the first stands in for every language that has none
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    return our_nodes(server)


@pytest.fixture(scope="module")
def texts(server) -> dict[str, dict]:
    """What the page gets for each language."""
    return server.get("/i18n")


@pytest.mark.parametrize("page", PAGES)
def test_help_page_names_every_input(server, nodes, page):
    for name, told in nodes.items():
        address = f"{server.address}/extensions/flowcache/docs/{page.format(name)}"
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        missing = [f"`{each}`" for each in inputs_of(told) if f"`{each}`" not in text]
        assert not missing, f"{name}: {page.format(name)} says nothing of {', '.join(missing)}"


def test_english_texts_are_those_of_the_nodes(nodes):
    """Each text of the file is on its node, and each node and input has its texts."""
    assert json.loads(ENGLISH.read_text(encoding="utf-8")) == {name: node_texts(told) for name, told in nodes.items()}


def test_chinese_texts_are_complete(nodes, texts):
    for name, told in nodes.items():
        assert name in texts["zh"]["nodeDefs"], f"{name} is missing in locales/zh/nodeDefs.json"
        given = texts["zh"]["nodeDefs"][name]
        assert shape(given) == shape(node_texts(told)), name
        assert CHINESE.search(given["description"])
        assert all(CHINESE.search(each.get("tooltip", "一")) for each in given.get("inputs", {}).values())


def shape(texts: dict | str) -> dict | None:
    """The keys, all the way down."""
    return {key: shape(value) for key, value in texts.items()} if isinstance(texts, dict) else None


def test_link_types_have_names(nodes, texts):
    """The page shows an output's type where it has no name of its own."""
    kinds = {kind for told in nodes.values() for kind in told["output"] if kind.startswith("FLOWCACHE_")}
    assert kinds
    for language in ("en", "zh"):
        assert kinds <= texts[language]["dataTypes"].keys()


def test_texts_are_plain(texts):
    """The page reads { } @ | in a text as instructions."""
    for language in ("en", "zh"):
        for name in texts[language]["nodeDefs"]:
            assert not re.search(r"[{}@|]", "".join(strings(texts[language]["nodeDefs"][name]))), name


def strings(texts: dict | str) -> list[str]:
    return [texts] if isinstance(texts, str) else [each for value in texts.values() for each in strings(value)]
