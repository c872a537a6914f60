"""What becomes of a run: its chunks are decoded, go to a folder to resume from, to a preview; the node says how far it
is."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...flowcache_core.engine.loop import Boundary, Chunk, Engine, Progress
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.snapshot import Snapshot, SnapshotDelta
from ...flowcache_core.history.streams import AT_ONCE, Pending, SideStream
from ...flowcache_core.report import Report
from ...flowcache_core.storage.run_folder import RunFolder
from .listener import RunListener
from .live import LiveRun
from .progress import describe, describe_plan, progress_text
from .steering import Steering
from .stream import Outlet, show

SECONDS = 0.1  # between two lines on the node: each has the server's thread wait for this one, and this one for it
OUTDATED = (
    "interrupted runs of an earlier version of FlowCache cannot be resumed: this one starts anew; they are removed when"
    " space is needed, or delete flowcache/runs in ComfyUI's user folder"
)


@dataclass
class FinishedChunks(RunListener):
    """Takes a run's finished chunks, oldest first, and what it leaves in the end.

    Attributes:
        folder: keeps chunks on disk, or None.
        outlet: decodes them, or None.
        keep: hold all latents in memory, not only the newest chunk's.
        node_id: of the node that shows the progress, or None.
        report, histories: of the run, when it has ended; before that, of what an interrupted run left.
        first: number of the first generated chunk.
        inside: given frames that it begins with, where a sampler hands them out again.
        goes_on: where a chunk cannot be kept, the run goes on without its folder.
        side: takes chunks to the CPU beside the run. What becomes of them there is left for the next tick, when the
            device has got more to do; `settle` does it.
        chosen: lines for the report on what was chosen before the run.
        latents: on the CPU, in the network's latent space; what came before the run included.
        count: chunks that were taken, with those of an interrupted run.
        live: takes captions while the run goes on, or None.
        recent: frames of latents that are held in any case, for who goes on from the run.
        first_frames: frames at the video's beginning that are held in any case.
        beginning: those, as far as they are there.
    """

    folder: RunFolder | None
    outlet: Outlet | None
    keep: bool
    node_id: str | None
    report: Report
    first: int
    inside: int = 0
    goes_on: bool = False
    side: SideStream = AT_ONCE
    chosen: Sequence[str] = ()
    histories: dict[Hashable, Snapshot] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)
    count: int = 0
    live: LiveRun | None = None
    recent: int = 1
    first_frames: int = 0
    beginning: Tensor | None = None

    def __post_init__(self):
        self.begun = time.perf_counter()
        self.earlier = range(0)
        self.last_line = (-1, 0.0)  # chunks that the node said were finished, and when
        self.on_disk = 0  # chunks, with those of an interrupted run, that are there after a kill
        self.outdated = False
        self.lost = ""  # why chunks are not kept any more
        self.unkept: list[tuple[int, Pending[Tensor]]] = []  # finished chunks whose keys come with the next forward
        self.tick = self.ticks = 1  # of the run, for the preview

    @property
    def notes(self) -> list[str]:
        """For the report."""
        notes = [f"{len(self.earlier)} chunks were there from an interrupted run"] if self.earlier else []
        if self.lost:
            notes.append(f"chunks were not kept to resume from any more: {self.lost}")
        if self.outdated:
            notes.append(OUTDATED)
        if self.folder is not None and self.folder.full:
            notes.append("the limit for interrupted runs is reached: newer chunks were not kept to resume from")
        return notes

    def finished(self, engine: Engine) -> int:
        """Counts the chunks that are told as finished, with those of an interrupted run: of a run that is kept, what is
        on disk."""
        if self.folder is not None and not self.folder.full:
            return self.on_disk
        return len(self.earlier) + engine.report.chunks_done

    def begin(self, before: Sequence[Tensor], earlier: range) -> None:
        """Takes the frames that came before, in parts [B, C, T, H, W], and the chunks that an interrupted run left."""
        self.earlier, self.on_disk = earlier, len(earlier)
        self.outdated = self.folder is not None and not earlier and self.folder.outdated()
        for part in before:
            self._take(part)
        for chunk in earlier:
            throw_exception_if_processing_interrupted()
            self.count += 1
            progress_text(f"taking chunk {self.count} of {len(earlier)} from the interrupted run", self.node_id)
            assert self.folder is not None  # it holds the earlier chunks
            self._take(self._generated(Chunk(chunk, self.folder.latent(chunk))))

    def plan(self, report: Report) -> None:
        report.notes[:0] = self.chosen
        progress_text(describe_plan(report), self.node_id)

    def progress(self, told: Progress, engine: Engine) -> None:
        self.settle()
        self._begin_to_keep(engine)
        self.tick, self.ticks = told.tick, told.ticks
        if self.outlet is not None:
            self._show(self.outlet.decoded())
        (before, last), finished, now = self.last_line, self.finished(engine), time.perf_counter()
        if finished > before or now - last >= SECONDS or told.tick == told.ticks:
            self.last_line = finished, now
            progress_text(describe(told, engine, self.begun, finished, len(self.earlier)), self.node_id)

    def steer(self, ahead: Boundary, steering: Steering) -> bool:
        return self.live is not None and self.live.steer(ahead, steering)

    def keep_prompts(self, text: str) -> None:
        """Keeps what the chunks show, for who resumes the run."""
        if self.folder is not None:
            self._kept(partial(self.folder.keep_prompts, text))

    def chunk(self, chunk: Chunk, engine: Engine) -> None:
        self.settle()
        latent = self.side.to_cpu(chunk.latent)
        if self.folder is not None:
            self.unkept.append((chunk.number, latent))
        self._begin_to_keep(engine)
        if self.outlet is not None:
            self.outlet.movable = lambda: engine.forward.movable
        self.side.later(partial(self._hand_on, chunk.number, latent))
        self.count += 1

    def _begin_to_keep(self, engine: Engine) -> None:
        if self.folder is None or not self.unkept or not engine.settled:
            return
        if not self.folder.full:
            delta = engine.begin_delta(full=not self.folder.begun)
            self.side.later(partial(self._keep, self.folder, self.unkept, delta))
        self.unkept = []

    def _keep(
        self, folder: RunFolder, unkept: list[tuple[int, Pending[Tensor]]], delta: Callable[[], SnapshotDelta]
    ) -> None:
        *before, newest = [Chunk(number, latent.on_cpu()) for number, latent in unkept]
        if self._kept(lambda: folder.add(newest, delta(), before)):
            self.on_disk = newest.number + 1 - self.first

    def _kept(self, keep: Callable[[], None]) -> bool:
        """Has something kept to resume from, and says whether it is; where it cannot be, nothing more is."""
        try:
            keep()
        except UserError as error:
            if not self.goes_on:
                raise
            self.lost, self.folder = str(error), None
            return False
        return True

    def _hand_on(self, number: int, latent: Pending[Tensor]) -> None:
        self._show(self._take(self._generated(Chunk(number, latent.on_cpu()))))

    def _show(self, chunks: Sequence[Tensor]) -> None:
        for frames in chunks:
            show(frames, self.tick, self.ticks)

    def settle(self) -> None:
        self.side.settle()

    def done(self, engine: Engine, keeps_history: bool) -> None:
        self.settle()
        self.report, self.histories = engine.report, engine.save() if keeps_history else {}
        self._begin_to_keep(engine)
        self.settle()

    def _generated(self, chunk: Chunk) -> Tensor:
        """A chunk's frames that were not given."""
        return chunk.latent[:, :, self.inside :] if chunk.number == self.first else chunk.latent

    def _take(self, latent: Tensor) -> list[Tensor]:
        """Takes a latent; gives the frames [T, H, W, 3] of chunks that were decoded."""
        if self.first_frames and self.beginning is None:
            self.beginning = latent[:, :, : self.first_frames].clone()
        self.latents.append(latent)
        while not self.keep and sum(part.shape[2] for part in self.latents[1:]) >= self.recent:
            del self.latents[0]
        return [] if self.outlet is None else self.outlet.add(latent)
