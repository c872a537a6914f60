"""What becomes of finished chunks besides the latent that a run gives: a video, a folder to resume from, a preview."""

from collections.abc import Callable

from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ..flowcache_core.engine import Chunk
from ..flowcache_core.run_folder import RunFolder
from .host_video import VideoOutlet, show


class Finished:
    """Takes a run's finished chunks, oldest first.

    Args:
        folder: keeps them on disk, or None.
        outlet: writes them to a video, or None.
        keep: hold all latents in memory, not only the newest chunk's.

    Attributes:
        latents: on the CPU, in the network's latent space; what came before the run included.
        count: chunks that were taken, with those of an interrupted run.
    """

    def __init__(self, folder: RunFolder | None, outlet: VideoOutlet | None, keep: bool):
        self.folder, self.outlet, self.keep = folder, outlet, keep
        self.latents: list[Tensor] = []
        self.count = 0
        self.earlier = range(0)
        self.tick = self.ticks = 1  # of the run, for the preview

    @property
    def notes(self) -> list[str]:
        """For the report."""
        notes = [f"{len(self.earlier)} chunks were there from an interrupted run"] if self.earlier else []
        if self.folder is not None and self.folder.full:
            notes.append("the limit for interrupted runs is reached: newer chunks were not kept to resume from")
        return notes

    def begin(self, before: Tensor | None, earlier: range, told: Callable[[str], None] = lambda line: None) -> None:
        """Takes the frames [B, C, T, H, W] that came before, and the chunks that an interrupted run left.

        `told` is called with a line on how that goes.
        """
        self.earlier = earlier
        for part in [] if before is None else before.split(8, dim=2):
            self._take(part)
        for chunk in earlier:
            throw_exception_if_processing_interrupted()
            self.count += 1
            told(f"taking chunk {self.count} of {len(earlier)} from the interrupted run")
            self._take(self.folder.latent(chunk))

    def add(self, chunk: Chunk, save) -> None:
        """A chunk of the run; `save` copies the history."""
        if self.folder is not None and not self.folder.full:
            self.folder.add(chunk, save())
        frames = self._take(chunk.latent.cpu())
        if frames is not None:
            show(frames, self.tick, self.ticks)
        self.count += 1

    def _take(self, latent: Tensor) -> Tensor | None:
        if not self.keep:
            self.latents.clear()
        self.latents.append(latent)
        return None if self.outlet is None else self.outlet.add(latent)
