"""Captions that change while a run goes on: the run that takes them, and who finds that run.

A caption waits in a box of one place, which the run looks into between two ticks, in its own thread. There it is
encoded as well, when the first chunk that shows it begins.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock

from comfy.model_management import InterruptProcessingException
from server import PromptServer
from torch import isfinite

from ...flowcache_core.engine.loop import Boundary
from ...flowcache_core.errors import UserError, first_line, one_line, shortened
from ...flowcache_core.prompts import Span, begins_shot
from ...flowcache_core.report import Report
from ...flowcache_core.timeline import Timeline
from .captions import encoded, span_conditions
from .live_prompt import LivePrompt
from .steering import Steering

EVENT = "flowcache.live"  # what the page is told of a run
REFUSED = "a caption was not taken"
CHANGED = "captions that changed while it ran"


@dataclass(frozen=True)
class Change:
    """What a run shall be told: a caption and over how many chunks it is blended, or no caption."""

    caption: str | None
    blend: int | None = None
    stop: bool = False


class TooLate(Exception):
    """All chunks of the run have begun."""


class LiveRun:
    """A run whose captions can be changed.

    Args:
        prompt: of the run.
        prompt_id: the host's name of the run.
        first, chunks: number of its first chunk, and of all chunks of the video.
        timeline: what its chunks show, as far as is known.
        keep: takes all captions so far, whenever they have changed.
    """

    def __init__(
        self, prompt: LivePrompt, prompt_id: str, first: int, chunks: int, timeline: Timeline,
        keep: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.prompt, self.prompt_id, self.first, self.chunks = prompt, prompt_id, first, chunks
        self.timeline, self.keep = timeline, keep
        self._lock = Lock()
        self._box: Change | None = None
        self._ahead = first  # the first chunk that has not begun
        self._stops = False
        begun = {prompt.caption: 1.0}
        self._shown: Mapping[str, float] = {} if begins_shot(begun) else begun
        self._known = {prompt.caption: (prompt.embedding, prompt.said)}  # `encoded` of the captions that are shown
        self._untried = False  # a change that no chunk has shown yet
        self._changes, self._seconds = 0, 0.0
        self._told: Timeline | None = None  # what the page knows

    def post(self, change: Change) -> str:
        """Takes a change, from another thread, in place of one that waits; says from which chunk it holds.

        Raises:
            UserError: a caption that cannot be shown.
            TooLate: no chunk is left that could show it.
        """
        with self._lock:
            said = []
            if change.caption is not None:
                if self._ahead >= self.chunks:
                    raise TooLate
                self.timeline.changed(self._ahead, change.caption, self._blend(change))
                if self.prompt.clip is None:
                    encoded(None, change.caption)  # knows few words
                said.append(f"the caption holds from {self._name(self._ahead)} on")
            if change.stop:
                self._stops = True
                said.append("the run ends with the chunk that is finished next")
            if change.caption is not None:
                self._box = change
        return ", ".join(said)

    def steer(self, ahead: Boundary, steering: Steering) -> bool:
        """Is asked by the run between its ticks; True ends it."""
        with self._lock:
            change, self._box, self._ahead = self._box, None, ahead.chunk + ahead.begins
        if change is not None:
            self._take(change, ahead.chunk, steering.report)
        if ahead.begins:
            RUNS.open(self)  # for its second chunk: frames that are given saw the caption of the first
            self._show(ahead.chunk, steering)
        return self._stops

    def prompts(self, chunks: int) -> str:
        """What the first chunks of the video show, as Prompts over Time."""
        return self.timeline.until(chunks).text()

    def tell(self, said: str, running: bool = True, prompts: bool = True) -> None:
        """Tells the page that queued the run; with all prompts once they have changed."""
        server = getattr(PromptServer, "instance", None)
        client = getattr(server, "client_id", None)
        if server is None or client is None:
            return
        told = {"node": self.prompt.node_id, "prompt_id": self.prompt_id, "running": running, "said": said}
        if prompts and self.timeline is not self._told:
            told["prompts"], self._told = self.prompts(self.chunks), self.timeline
        server.send_sync(EVENT, told, client)

    def _name(self, chunk: int) -> str:
        """A chunk as the node that samples tells it, which counts those that it makes from 1."""
        return f"chunk {chunk + 1 - self.first} of {self.chunks - self.first}"

    def _blend(self, change: Change) -> int:
        return self.prompt.blend if change.blend is None else change.blend

    def _take(self, change: Change, chunk: int, report: Report) -> None:
        assert change.caption is not None
        if chunk >= self.chunks:
            self._refuse(report, f"it came when the last chunk had begun: {shortened(change.caption, 60)}")
            return
        try:
            self.timeline = self.timeline.changed(chunk, change.caption, self._blend(change))
        except UserError as error:
            self._refuse(report, str(error))
            return
        self._untried = True
        self.keep(self.timeline.text())
        self.tell(f"from {self._name(chunk)} on: {shortened(change.caption, 60)}", prompts=False)

    def _show(self, chunk: int, steering: Steering) -> None:
        """Has a chunk that begins show what is written for it."""
        weights = dict(self.timeline.at(chunk))
        said = f"{self._name(chunk)} begins"
        if not _alike(weights, self._shown):
            begun = time.perf_counter()
            try:
                new = self._encode(list(weights), steering)
            except InterruptProcessingException:
                raise
            except Exception as error:  # a wrong caption, a full device: no reason to lose the run
                before = self.timeline.until(chunk)
                if not _alike(before.at(chunk), self._shown):  # a run that is resumed with it
                    raise
                self.timeline, self._untried = before, False
                self.keep(before.text())
                self._refuse(steering.report, one_line(first_line(error)))
                return
            ((embedding, more),) = span_conditions(Span(chunk, chunk, weights), self._known)
            steering.show(chunk, embedding, more)
            seconds = time.perf_counter() - begun
            self._shown, self._untried, self._changes = weights, False, self._changes + self._untried
            if new:
                self._seconds += seconds
                moved = "" if self.prompt.clip is None else ", moving the network out and back included"
                said += f"; the caption was encoded in {seconds:.1f} s{moved}"
            if self._changes:
                line = f"{CHANGED}: {self._changes}, encoded in {self._seconds:.1f} s"
                steering.report.note(line, CHANGED)
        self.tell(said)

    def _encode(self, captions: list[str], steering: Steering) -> bool:
        """Makes the embeddings of captions known, and no others; says whether the encoder was needed."""
        missing = [caption for caption in captions if caption not in self._known]
        try:
            found = {caption: encoded(self.prompt.clip, caption) for caption in missing}
        finally:
            if missing and self.prompt.clip is not None:
                steering.bring_back()
        for embedding, _ in found.values():
            if not isfinite(embedding).all():
                raise UserError("the encoder gave NaN or infinite values for it.")
        known = self._known | found
        self._known = {caption: known[caption] for caption in captions}
        return bool(missing)

    def _refuse(self, report: Report, why: str) -> None:
        report.note(f"{REFUSED}: {why}", REFUSED)
        self.tell(f"{REFUSED}: {why}")


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether captions are mixed alike to the bit, which takes their order too."""
    return list(one.items()) == list(other.items())


class LiveRuns:
    """The runs that take captions now, by the host's name of the run and the node."""

    def __init__(self):
        self._lock = Lock()
        self._runs: dict[tuple[str, str], LiveRun] = {}
        self._to_go_on: Counter[str] = Counter()

    @contextmanager
    def of(self, run: LiveRun) -> Iterator[None]:
        """Ends what `open` begins."""
        try:
            yield
        finally:
            with self._lock:
                self._runs.pop((run.prompt_id, run.prompt.node_id), None)
            run.tell("", running=False)

    def open(self, run: LiveRun) -> None:
        """Has a run found from now on."""
        with self._lock:
            self._runs[run.prompt_id, run.prompt.node_id] = run

    def find(self, prompt_id: str, node_id: str) -> LiveRun | None:
        """Gives the run of that name, if it goes on."""
        with self._lock:
            return self._runs.get((prompt_id, node_id))

    def to_go_on(self, node_id: str) -> None:
        """Hears that a run of a node was stopped and is kept, so that the same graph goes on from it."""
        self._to_go_on = Counter(dict(self._to_go_on.most_common(MOST_NODES)))
        self._to_go_on[node_id] += 1

    def stopped(self, node_id: str) -> int:
        """Counts those runs: the host shall not take one for the whole, as it would by what goes into the node."""
        return self._to_go_on[node_id]


MOST_NODES = 1000  # whose stopped runs are counted
RUNS = LiveRuns()


def live_run(
    prompt: LivePrompt, first: int, chunks: int, kept: str, before: str, keep: Callable[[str], None]
) -> LiveRun:
    """Makes the run of a prompt.

    Args:
        first, chunks: as for `LiveRun`.
        kept: all captions of the same run that was interrupted, or nothing.
        before: those of the video that it goes on from, or nothing.
        keep: as for `LiveRun`.
    """
    timeline = Timeline.read(kept) if kept else _begun(prompt.caption, first, before)
    prompt_id = str(getattr(getattr(PromptServer, "instance", None), "last_prompt_id", ""))
    return LiveRun(prompt, prompt_id, first, chunks, timeline, keep)


def _begun(caption: str, first: int, before: str) -> Timeline:
    """A caption behind what a state says of its chunks; alone where it does not, or more than can be gone on with."""
    if before:
        with suppress(UserError):
            return Timeline.begin(caption, first, Timeline.read(before))
    return Timeline.begin(caption, first)
