"""Tables of the lab's pages."""

from collections.abc import Iterable, Sequence


def markdown(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
