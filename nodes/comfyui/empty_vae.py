"""A VAE object of the host that is to be filled with a module of ours."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.sd


def empty_vae() -> comfy.sd.VAE:
    """The host's object without a module; the host's warning that it found no weights is left out."""
    with _without("No VAE weights detected"):
        return comfy.sd.VAE(sd={})


@contextmanager
def _without(words: str) -> Iterator[None]:
    """Leaves lines with these words out of the host's log."""

    def others(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    log = logging.getLogger()
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)
