"""The last streamed run, held so that its video can be written again: another file name or frame rate changes no
latents."""

from dataclasses import replace

from ...flowcache_core.report import Report
from ...flowcache_core.storage.state import State

WRITTEN_ANEW = "the finished latents of this run were still there: the video alone was written anew"
NOT_KEPT = (
    "this run was sampled before, and its latents were not kept, so it was sampled anew; turn on keep_latents of "
    "Stream Video to Disk, or connect Resume, to write another video of the same run"
)


class HeldRun:
    """One run at most, of which nothing is held any more when another one begins."""

    def __init__(self):
        self.name = ""
        self.result: tuple[State, Report] | None = None

    def hold(self, name: str, state: State, report: Report) -> None:
        """Holds a finished run by what determines it; its latents only if all of them are there."""
        self.name, self.result = name, (state, report) if not state.dropped else None

    def take(self, name: str) -> tuple[State, Report] | None:
        """Gives the run of that name, with a report that says so."""
        if not name or name != self.name or self.result is None:
            return None
        state, report = self.result
        notes = [note for note in report.notes if note != WRITTEN_ANEW]
        return state, replace(report, notes=[*notes, WRITTEN_ANEW])

    def let_go(self, name: str) -> list[str]:
        """Makes room for a run that is sampled; says for its report if it was sampled before, and could not be held."""
        again = bool(name) and name == self.name
        self.name, self.result = "", None
        return [NOT_KEPT] if again else []


HELD = HeldRun()
