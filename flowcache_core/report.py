"""What a run did: which steps were recomputed, how long it took, how large the history grew."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from .schedule import ChunkSchedule, Shot


@dataclass
class Report:
    """Filled in while a run goes on.

    Attributes:
        schedule: of the run.
        settings: one line that says how it was run.
        decisions: for each branch and chunk, one entry a step: True recomputed, False reused.
        clean_passes: extra forwards at noise level 0, in all branches.
        seconds: wall time of the run.
        forward_seconds: of them, inside the backbone.
        history: (tick, bytes in use), one entry a tick.
        history_bytes_planned: what the run will allocate for its history, worked out before it begins.
        history_bytes_allocated: what it did allocate: buffers, and queries for the next cut.
        history_bytes_unbounded: what an unbounded history of the same run would take.
        device_bytes_peak: what the process had allocated on a CUDA device at most, weights and all; 0 elsewhere.
        attention_flops: floating-point operations of attention among the video's tokens, two for each multiply-add.
        layer_tokens: tokens that went through a layer, all layers and branches counted.
        chunks_done: chunks finished.
        notes: lines on what was out of the ordinary.
        prompts: what the video's chunks show, as Prompts over Time, where the run could be steered.
        stores: clean passes that a plain run takes a chunk, to store keys and values.
        shown: stands for the texts that the history was computed for, of a family that computes it anew for others.
        reruns: forwards of that, in all branches; they count as clean passes.
        rerun_for: chunks before which the history was computed anew.
        shot: that the newest chunk is in, of a family that makes videos of several.
    """

    schedule: ChunkSchedule
    settings: str = ""
    decisions: dict[Hashable, dict[int, list[bool]]] = field(default_factory=dict)
    clean_passes: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    history: list[tuple[int, int]] = field(default_factory=list)
    history_bytes_planned: int = 0
    history_bytes_allocated: int = 0
    history_bytes_unbounded: int = 0
    device_bytes_peak: int = 0
    attention_flops: int = 0
    layer_tokens: int = 0
    chunks_done: int = 0
    notes: list[str] = field(default_factory=list)
    prompts: str = ""
    stores: int = 1
    shown: str = ""
    reruns: int = 0
    rerun_for: list[int] = field(default_factory=list)
    shot: Shot = Shot()

    def record(self, chunk: int, branches: Sequence[Hashable], recomputed: bool) -> None:
        """Notes what was decided for a chunk's step."""
        for branch in branches:
            self.decisions.setdefault(branch, {}).setdefault(chunk, []).append(recomputed)

    def reran(self, chunk: int, always: bool, missing: bool) -> None:
        """Notes that the history was computed anew before a chunk began; `always`: as before every one of its family,
        `missing`: not all of it could be."""
        self.rerun_for.append(chunk)
        what = "the history was computed anew "
        chunks = "before every chunk" if always else f"for the prompt of chunk {', '.join(map(str, self.rerun_for))}"
        if missing or not always:
            self.note(f"{what}{chunks}" + (", as far as its latents were there" if missing else ""), what)

    def began_shots(self, chunks: Sequence[int]) -> None:
        """Notes which chunks have begun a new shot."""
        topic = "a new shot begins with chunk "
        self.note(topic + ", ".join(map(str, chunks)) if chunks else "", topic)

    def note(self, line: str, topic: str) -> None:
        """Adds a line to the notes, in place of an earlier one that begins with the same topic."""
        self.notes = [note for note in self.notes if not note.startswith(topic)]
        if line:
            self.notes.append(line)

    @property
    def _steps(self) -> list[bool]:
        """Whether it was recomputed, of every step so far, in all branches."""
        return [again for chunks in self.decisions.values() for steps in chunks.values() for again in steps]

    @property
    def forwards_executed(self) -> int:
        """Forwards that were run, clean passes included."""
        return sum(self._steps) + self.clean_passes

    @property
    def forwards_total(self) -> int:
        """Forwards that a plain run of the same steps takes: every step, clean passes that store its chunks, and those
        that compute the history anew."""
        stored = self.stores * sum(len(chunks) for chunks in self.decisions.values())
        return len(self._steps) + stored + self.reruns

    @property
    def reused(self) -> float:
        """Share of steps that were reused, 0 to 1."""
        steps = self._steps
        return 1.0 - sum(steps) / len(steps) if steps else 0.0

    @property
    def fewer(self) -> float:
        """How many times more forwards a plain run takes."""
        return self.forwards_total / self.forwards_executed if self.forwards_executed else 1.0

    @property
    def saved(self) -> float:
        """Seconds that a plain run takes longer, by what a forward of this one took."""
        return self.forward_seconds * (self.fewer - 1.0)

    @property
    def overhead(self) -> float:
        """Share of the run's time that was not spent inside the backbone, 0 to 1."""
        return max(0.0, 1.0 - self.forward_seconds / self.seconds) if self.seconds else 0.0

    @property
    def history_bytes_peak(self) -> int:
        return max((used for _, used in self.history), default=0)

    def as_dict(self) -> dict:
        """Numbers and decisions in a form that JSON takes."""
        return {
            "settings": self.settings,
            "chunks": self.chunks_done,
            "steps": self.schedule.steps,
            "lag": self.schedule.lag,
            "forwards_total": self.forwards_total,
            "forwards_executed": self.forwards_executed,
            "clean_passes": self.clean_passes,
            "reused": round(self.reused, 4),
            "seconds": round(self.seconds, 4),
            "overhead": round(self.overhead, 4),
            "notes": self.notes,
            "prompts": self.prompts,
            "history_bytes_peak": self.history_bytes_peak,
            "history_bytes_planned": self.history_bytes_planned,
            "history_bytes_allocated": self.history_bytes_allocated,
            "history_bytes_unbounded": self.history_bytes_unbounded,
            "device_bytes_peak": self.device_bytes_peak,
            "attention_flops": self.attention_flops,
            "layer_tokens": self.layer_tokens,
            "history_bytes": [used for _, used in self.history],
            "decisions": {
                str(branch): {
                    str(chunk): "".join("x" if again else "." for again in steps) for chunk, steps in chunks.items()
                }
                for branch, chunks in self.decisions.items()
            },
        }

    def text(self) -> str:
        """Writes a few lines for people."""
        lines = [
            self.settings,
            f"{self.chunks_done} chunks of {self.schedule.steps} steps, lag {self.schedule.lag}",
            f"forwards: {self.forwards_executed} of {self.forwards_total} ({self.fewer:.1f}x fewer), "
            f"{self.reused:.0%} of steps reused",
            f"time: {self.seconds:.1f} s, {self.seconds / max(1, self.chunks_done):.2f} s a chunk, overhead "
            f"{self.overhead:.1%}" + (f", about {self.saved:.1f} s saved against plain" if self.saved else ""),
            "history: "
            + (f"planned {megabytes(self.history_bytes_planned)}, " if self.history_bytes_planned else "")
            + f"peak {megabytes(self.history_bytes_peak)}, unbounded {megabytes(self.history_bytes_unbounded)}",
            *self.notes,
            *([f"prompts over time:\n{self.prompts}"] if self.prompts else []),
        ]
        return "\n".join(line for line in lines if line)


def byte_unit(count: int) -> tuple[int, str]:
    """Chooses the unit in which so many bytes are written: its size and its name."""
    return (2**30, "GB") if count >= 2**30 else (2**20, "MB")


def megabytes(count: int) -> str:
    size, unit = byte_unit(count)
    return f"{count / size:.{2 if unit == 'GB' else 1}f} {unit}"


def share_of(used: int, total: int) -> str:
    """Writes two sizes in bytes with the larger one's unit: 1.2 of 2.0 GB."""
    size, unit = byte_unit(total)
    return f"{used / size:.1f} of {total / size:.1f} {unit}"


def clock(seconds: float) -> str:
    """Writes a time that is left as people say it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
