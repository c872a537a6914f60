"""One process makes a run, and others follow: whatever guidance asks of the network, all of them run their part of.

The first process has the loop, the guidance and the policies; the others have a forward of their own over their part
of the history, and are told of each call. So guidance may be anything, the host's guider too, and nothing but the
network need be the same everywhere.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.causal import CausalForward
from ..engine.forward import Step, Velocity
from ..engine.guidance import Guidance, Network, Texts
from ..history.cache import begin_delta
from ..history.snapshot import Snapshot, SnapshotDelta
from ..models.magi.forward import MagiForward
from ..models.magi.network import MagiText
from ..schedule import Given
from .crew import Crew
from .layout import Parallel, agreed


class DividedNetwork:
    """Calls of a network of which this process has a part; every process gets all velocities.

    Args:
        parallel: what this process has.
        whole: runs that part.
    """

    def __init__(self, parallel: Parallel, whole: Network):
        self.parallel, self.whole = parallel, whole
        self._group: dict[Hashable, int] = {}  # of processes, by branch, as they are first seen

    def __call__(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        if self.parallel.scheme == "pipeline":
            return self._one_by_one(steps, branches, texts, backbone)
        if self.parallel.peers is not None:
            return self._by_group(steps, branches, texts, backbone)
        return self.whole(steps, branches, texts, backbone)

    def _of_branches(self, steps, branches, texts: Texts, backbone, chosen: Sequence[int]) -> list[Tensor]:
        """Runs some branches of a call, by their numbers there."""

        def parts(x: Tensor) -> Tensor:
            rows = x.chunk(len(branches))
            return torch.cat([rows[number] for number in chosen])

        asked = [step._replace(x=parts(step.x)) for step in steps]
        names = [branches[number] for number in chosen]
        return self.whole(asked, names, lambda chunk: [texts(chunk)[number] for number in chosen], backbone)

    def _one_by_one(self, steps, branches, texts: Texts, backbone) -> list[Tensor]:
        """Branches follow one another through the layers of all processes."""
        every = [self._of_branches(steps, branches, texts, backbone, [number]) for number in range(len(branches))]
        values = [torch.cat(parts) for parts in zip(*every, strict=True)]
        return agreed(values, self.parallel)

    def _by_group(self, steps, branches, texts: Texts, backbone) -> list[Tensor]:
        """Each group of processes runs its own branches."""
        peers = self.parallel.peers
        assert peers is not None
        names = [getattr(name, "branch", name) for name in branches]
        for name in names:
            self._group.setdefault(name, len(self._group) % peers.size)
        of_group = [
            [number for number, name in enumerate(names) if self._group[name] == group] for group in range(peers.size)
        ]
        mine, like = of_group[peers.rank], steps[0].x
        packed = like.new_empty(0)
        if mine:
            results = self._of_branches(steps, branches, texts, backbone, mine)
            packed = torch.cat([result.reshape(-1) for result in results])
        sizes = [step.x.numel() // len(branches) for step in steps]
        parts = peers.gather(packed, [(sum(sizes) * len(numbers),) for numbers in of_group])
        found: dict[tuple[int, int], Tensor] = {}  # by branch and step
        for numbers, part in zip(of_group, parts, strict=True):
            pieces = part.split([size * len(numbers) for size in sizes])
            for at, (step, piece) in enumerate(zip(steps, pieces, strict=True)):
                shape = (step.x.shape[0] // len(branches), *step.x.shape[1:])
                found |= {(number, at): one for number, one in zip(numbers, piece.view(-1, *shape), strict=True)}
        return [torch.cat([found[number, at] for number in range(len(branches))]) for at in range(len(steps))]


@dataclass
class LedGuidance:
    """Guidance whose calls of the network the others follow.

    Args:
        guidance: of the run.
        crew: the others.
        parallel: what this process has.
        most: texts that are remembered.
    """

    guidance: Guidance
    crew: Crew
    parallel: Parallel
    most: int = 64

    def __post_init__(self):
        self.at_once = self.guidance.at_once
        self._texts: dict[int, Tensor] = {}  # that the others have, oldest first, by number
        self._count = 0
        self._divided: DividedNetwork | None = None

    def mix(self, step: Step) -> Hashable:
        """Names the sum of branches that it takes at a step."""
        return self.guidance.mix(step)

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Gives all that a chunk is shown, in all branches."""
        return self.guidance.texts_of(chunk)

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Asks the guidance, whose calls of the network all processes run."""
        if self._divided is None:
            self._divided = DividedNetwork(self.parallel, network)
        return self.guidance.velocities(steps, self._network)

    def _network(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        assert self._divided is not None
        new: dict[int, Tensor] = {}
        # A window asks for the text of chunk 0, whatever it holds.
        shown = {chunk: [self._number(text, new) for text in texts(chunk)] for chunk in _chunks(steps)}
        cpu = [step._replace(x=step.x.cpu()) for step in steps]
        self.crew.tell(("network", cpu, tuple(branches), shown, {one: text.cpu() for one, text in new.items()}))
        with self.crew.section():
            return self._divided(steps, branches, texts, backbone)

    def _number(self, text: Tensor, new: dict[int, Tensor]) -> int:
        for number, known in self._texts.items():
            if known is text:
                return number
        self._count += 1
        new[self._count] = text
        remember(self._texts, self._count, text, self.most)
        return self._count


def _chunks(steps: Sequence[Step]) -> list[int | Given]:
    return list(dict.fromkeys([*(step.place.chunk for step in steps), 0]))


def remember(texts: dict[int, Tensor], number: int, text: Tensor, most: int) -> None:
    """Keeps a text, and lets go of the oldest ones; the same at both ends."""
    texts[number] = text
    while len(texts) > most:
        del texts[next(iter(texts))]


class LedForward(CausalForward):
    """A run over a history, of which the others keep their part.

    Args:
        crew, parallel: the others, and what this process has.
    """

    def __init__(self, crew: Crew, parallel: Parallel, *args, **kwargs):
        self.crew, self.parallel = crew, parallel
        super().__init__(*args, **kwargs)

    def commit(self, chunks: Sequence[int | Given]) -> None:
        """Makes chunks clean, everywhere."""
        if chunks:
            self.crew.tell(("commit", tuple(chunks)))
        super().commit(chunks)

    def save(self) -> dict[Hashable, Snapshot]:
        """The whole clean history."""
        return _whole(self.crew, self.parallel, "save", super().save())

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """What the whole clean history has grown by."""
        self.settle()
        return _whole_delta(
            self.crew,
            self.parallel,
            full,
            partial(begin_delta, self.histories, full, self.report.shown, self.report.shot),
        )


class LedMagiForward(MagiForward):
    """A run of MAGI-1, whose every call the others make too.

    Args:
        crew, parallel: the others, and what this process has.
    """

    def __init__(self, crew: Crew, parallel: Parallel, *args, **kwargs):
        self.crew, self.parallel = crew, parallel
        self._sent: set[int] = set()  # chunks whose texts the others have
        super().__init__(*args, **kwargs)

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs all branches of a tick's steps."""
        self._tell_texts(step.place.chunk for step in steps)
        self.crew.tell(("call", "velocities", [step._replace(x=step.x.cpu()) for step in steps]))
        with self.crew.section():
            answers = super().velocities(steps)
            values = agreed([answer.value for answer in answers], self.parallel)
        return [answer._replace(value=value) for answer, value in zip(answers, values, strict=True)]

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Runs a given whole chunk."""
        self.crew.tell(("call", "give", chunk, latent.cpu(), condition))
        with self.crew.section():
            super().give(chunk, latent, condition)

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes a finished chunk."""
        self.crew.tell(("call", "finish", chunk, latent.cpu()))
        super().finish(chunk, latent)

    def settle(self) -> None:
        """Makes the clean pass that waits."""
        if not self.waiting:
            return
        self.crew.tell(("call", "settle"))
        with self.crew.section():
            super().settle()

    def save(self) -> dict[Hashable, Snapshot]:
        """The whole clean history."""
        return _whole(self.crew, self.parallel, "save", super().save())

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """What the whole clean history has grown by."""
        return _whole_delta(self.crew, self.parallel, full, partial(super().begin_delta, full))

    def _tell_texts(self, chunks) -> None:
        for chunk in chunks:
            if isinstance(chunk, int) and chunk not in self._sent:
                told: MagiText = self.text(chunk)
                self.crew.tell(("text", chunk, told._replace(embedding=told.embedding.cpu(), mask=told.mask.cpu())))
                self._sent.add(chunk)


def _whole(crew: Crew, parallel: Parallel, word: str, mine: dict[Hashable, Snapshot]) -> dict[Hashable, Snapshot]:
    """Histories of which this process has a part and the others, told this word, theirs."""
    crew.tell((word,))
    with crew.section():
        return parallel.whole(mine)


def _whole_delta(
    crew: Crew, parallel: Parallel, full: bool, begin: Callable[[], Callable[[], SnapshotDelta]]
) -> Callable[[], SnapshotDelta]:
    crew.tell(("begin delta", full))
    delta = begin()

    def whole() -> SnapshotDelta:
        mine = delta()
        return mine._replace(histories=_whole(crew, parallel, "delta", mine.histories))

    return whole


class Follower:
    """A process that follows a run.

    Args:
        forward: over its part of the history.
        parallel: what it has.
        device: that it computes on.
        most: texts that are remembered, as at the other end.
    """

    def __init__(self, forward: Any, parallel: Parallel, device: torch.device, most: int = LedGuidance.most):
        self.forward, self.parallel, self.device, self.most = forward, parallel, device, most
        self.texts: dict[int, Tensor] = {}
        self.divided = DividedNetwork(parallel, forward.network) if hasattr(forward, "network") else None
        self._deltas: deque[Callable[[], SnapshotDelta]] = deque()  # begun, and not yet asked for

    @torch.inference_mode()
    def follow(self, what: str, *told: Any) -> None:
        """Does its part of what the first process does."""
        match what:
            case "network":
                self._network(*told)
            case "commit":
                self.forward.commit(*told)
            case "call":
                self._call(*told)
            case "save":
                self.parallel.whole(self.forward.save())
            case "begin delta":
                self._deltas.append(self.forward.begin_delta(*told))
            case "delta":
                self.parallel.whole(self._deltas.popleft()().histories)
            case _:
                raise ValueError(f"Told of '{what}', which no run knows.")

    def _network(self, steps: Sequence[Step], branches, shown: dict, new: dict[int, Tensor]) -> None:
        assert self.divided is not None
        dtype = steps[0].x.dtype
        for number, text in new.items():
            remember(self.texts, number, text.to(self.device), self.most)
        here = [step._replace(x=step.x.to(self.device, dtype)) for step in steps]
        self.divided(here, branches, lambda chunk: [self.texts[number] for number in shown[chunk]])

    def _call(self, name: str, *told: Any) -> None:
        there = [self._there(one) for one in told]
        answers = getattr(self.forward, name)(*there)
        if name == "velocities":
            agreed([answer.value for answer in answers], self.parallel)

    def _there(self, told: Any) -> Any:
        if isinstance(told, Tensor):
            return told.to(self.device)
        if isinstance(told, list):
            return [step._replace(x=step.x.to(self.device)) for step in told]
        return told
