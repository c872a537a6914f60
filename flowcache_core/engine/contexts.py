"""Texts as the network reads them, made once and kept while they are used."""

from collections.abc import Callable

from torch import Tensor


def texts_kept(max_active: int) -> int:
    """Says how many texts are kept for so many active chunks: two branches of each, and of one that becomes clean."""
    return 2 * (max_active + 1)


class Contexts:
    """Cross-attention keys and values of the texts that were used last.

    Args:
        make: makes them from a text embedding.
        most: so many texts are kept.
    """

    def __init__(self, make: Callable[[Tensor], object], most: int):
        self.make, self.most = make, most
        self.kept: list[tuple[Tensor, object]] = []

    def of(self, text: Tensor):
        """Gives a text's context, made where it is not there yet."""
        for known, context in self.kept:
            if known is text:
                return context
        self.kept = [*self.kept[1 - self.most :], (text, self.make(text))]
        return self.kept[-1][1]
