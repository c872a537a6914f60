"""A run's finished chunks on their way to its folder, as soon as the history holds them."""

from collections.abc import Callable

from ..engine.loop import Chunk, Engine
from .run_folder import RunFolder

Told = tuple[bool, bool]  # whether a history is there that can be added to, and whether there is no more room


class KeptChunks:
    """Takes a run's finished chunks, oldest first.

    Args:
        folder: of the run; None in a process that others write for.
        agreed: what the process that writes says, where there are several; all of them ask.
    """

    def __init__(
        self, folder: RunFolder | None, agreed: Callable[[tuple[bool, bool]], tuple[bool, bool]] = lambda mine: mine
    ):
        self.folder, self.agreed = folder, agreed
        self.unkept: list[Chunk] = []  # whose keys come with the next forward

    def chunk(self, chunk: Chunk, engine: Engine) -> None:
        """Takes a finished chunk."""
        self.unkept.append(chunk)
        self.settle(engine)

    def settle(self, engine: Engine) -> None:
        """Writes what can be written without changing what follows.

        Raises:
            UserError: the folder cannot be written to.
        """
        if not self.unkept or not engine.settled:
            return
        *before, newest = self.unkept
        self.unkept = []
        begun, full = self.agreed((self.folder is None or self.folder.begun, self.folder is None or self.folder.full))
        if full:
            return
        delta = engine.begin_delta(full=not begun)()
        if self.folder is not None:
            self.folder.add(newest, delta, before)
