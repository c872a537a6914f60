"""A progress bar of one line, on stderr."""

import sys
import time

from ..engine.loop import Progress

WIDTH = 28  # characters of the bar


class Bar:
    """Call it with the engine's progress. On a terminal it redraws its line; elsewhere it prints one at every tenth.

    Args:
        label: what is being done.
        chunks: chunks there will be in the end, those of a prefix or state included.
    """

    def __init__(self, label: str, chunks: int, stream=None):
        self.label, self.chunks = label, chunks
        self.stream = stream or sys.stderr
        self.begun = time.monotonic()
        self.shown = float("-inf")  # when, or which tenth, it was last drawn

    def __call__(self, told: Progress) -> None:
        share, seconds = told.tick / told.ticks, time.monotonic() - self.begun
        last = told.tick == told.ticks
        line = f"{self.label} {share:4.0%}, chunk {told.finished} of {self.chunks}, "
        line += f"{seconds:.1f} s" if last else f"{seconds / share - seconds:.0f} s left"
        if self.stream.isatty():
            if last or seconds - self.shown > 0.1:
                self.shown = seconds
                filled = round(share * WIDTH)
                self.stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (WIDTH - filled)}] {line}" + "\n" * last)
        elif int(share * 10) > self.shown:
            self.shown = int(share * 10)
            self.stream.write(line + "\n")
        self.stream.flush()
