"""What a node says of the run that it makes."""

import time
from collections.abc import Sequence

from server import PromptServer

from ...flowcache_core.engine.loop import Engine, Progress
from ...flowcache_core.report import Report, clock, megabytes, share_of


def progress_text(text: str, node_id: str | None) -> None:
    """Shows lines on the node that is running. Nodes 2.0 draws them as one, so a sign stands between them."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text.replace("\n", "\n· "), node_id)


def say(lines: Sequence[str]) -> None:
    """Shows lines on the node that is running, where it is another's or does not know its id."""
    if lines:
        progress_text("\n".join(lines), getattr(PromptServer.instance, "last_node_id", None))


def describe_plan(report: Report) -> str:
    """Says what is known before a run; stays on the node until its first tick is done."""
    planned, unbounded = report.history_bytes_planned, report.history_bytes_unbounded
    more = f", {megabytes(unbounded)} unbounded" if unbounded > planned else ""
    return f"history: {megabytes(planned)} planned{more}"


def describe(told: Progress, engine: Engine, begun: float, finished: int, earlier: int = 0) -> str:
    """Writes lines on how a run goes; they fit a node's width.

    Args:
        begun: when, by the clock of `perf_counter`.
        finished: chunks that are told as such.
        earlier: of those, the ones that an interrupted run left.
    """
    report, (used, room) = engine.report, engine.forward.history_bytes
    chunks = report.schedule.chunks
    total = earlier + chunks
    number = min(finished + 1, total)
    spent = time.perf_counter() - begun
    whole = spent * told.ticks / told.tick  # seconds that the run will take
    lines = [
        f"chunk {number} of {total}, {whole / chunks:.1f} s a chunk, {clock(whole - spent)} left",
        f"{report.fewer:.1f}x fewer forwards" + (f", history {share_of(used, room)}" if room else ""),
    ]
    return "\n".join([*lines, *report.notes])
