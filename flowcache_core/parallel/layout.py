"""How one video is divided among processes: branches of guidance first, then tokens and heads, or layers."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..engine.build import RunSettings
from ..engine.forward import Step, Velocity
from ..engine.guidance import WeightedGuidance
from ..engine.loop import Engine
from ..errors import UserError
from ..history.cache import Attention
from ..history.plan import NetworkSizes
from ..history.snapshot import Snapshot, SnapshotDelta
from ..settings import Settings
from .branches import DividedBranches
from .heads import head_scheme
from .pipeline import OneByOne, PipelineBackbone, keep_layers
from .ranks import Ranks, shares
from .team import Team
from .ulysses import UlyssesBackbone, sizes_of_part

Scheme = Literal["ulysses", "pipeline"]
SCHEMES: tuple[Scheme, ...] = ("ulysses", "pipeline")


@dataclass(frozen=True)
class Part:
    """What of a run's history a process holds.

    Attributes:
        branches: all of them where None.
        layers, heads: of keys, likewise.
        asked: query heads of a key head.
        counts: whether what it holds is to be taken from it; of processes that hold the same, the first one's is.
    """

    branches: tuple[str, ...] | None = None
    layers: range | None = None
    heads: range | None = None
    asked: int = 1
    counts: bool = True

    def of(self, whole: Snapshot) -> Snapshot:
        """This process's part of a history."""
        if self.layers is not None:
            inside = slice(self.layers.start, self.layers.stop)
            return Snapshot(*(part[inside] if len(part) else part for part in whole))
        if self.heads is None:
            return whole
        held = slice(self.heads.start, self.heads.stop)
        asking = slice(self.heads.start * self.asked, self.heads.stop * self.asked)
        queries = whole.queries[:, :, asking] if len(whole.queries) else whole.queries
        return Snapshot(whole.keys[:, :, held], whole.values[:, :, held], whole.tokens[:, :, held], queries)


class Parallel:
    """One run's processes, and what each of them does; `generate` takes it as `parallel`.

    Args:
        team: the processes.
        scheme: "ulysses" divides tokens and heads, "pipeline" layers.
        branches: of guidance that the run has; two are divided before anything else is, where each half of the
            processes can take one.
        sharded: weights of the blocks are divided too. A pipeline's are in any case.

    Attributes:
        part: of the history that this process holds.
        ranks: among which tokens or layers are divided.
        peers: processes with the same part of other branches, or None.
        notes: lines for the report.
        pipeline: this process's layers, where those are divided; once there is a backbone.
    """

    def __init__(self, team: Team, scheme: Scheme = "ulysses", branches: int = 1, sharded: bool = False):
        if scheme not in SCHEMES:
            raise UserError(f"The scheme is '{scheme}', expected one of {', '.join(SCHEMES)}.")
        self.team, self.scheme, self.sharded = team, scheme, sharded and scheme == "ulysses"
        everyone, half = range(team.size), team.size // 2
        self.peers: Ranks | None = None
        self.everyone = Ranks.everyone()
        self.ranks = self.everyone
        self._keeping = Ranks.everyone()  # what goes to states and folders is no traffic of the network
        if halved(scheme, branches, team.size):
            self.ranks = Ranks.divided([everyone[:half], everyone[half:]])
            self.peers = Ranks.divided([(one, one + half) for one in range(half)])
        self.part = Part()
        self.notes: list[str] = []
        self.pipeline: PipelineBackbone | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes what is written."""
        return self.team.rank == 0

    @property
    def sent(self) -> int:
        """Bytes that this process has sent for the network."""
        groups = {id(group): group for group in (self.everyone, self.ranks, self.peers) if group}
        return sum(group.sent for group in groups.values())

    def backbone(self, whole: Any, keep: Callable[[Any, range], None] = keep_layers) -> Any:
        """What runs this process's part of a network.

        Args:
            keep: takes all layers but some away from a backbone; as it is, they are let go of.
        """
        self.part, self.notes = Part(), []
        if self.scheme == "pipeline":
            self.pipeline = PipelineBackbone(whole, self.ranks, keep)
            self.part = Part(layers=self.pipeline.held, counts=True)
            made: Any = self.pipeline
        else:
            if self.sharded:
                from torch.distributed.device_mesh import init_device_mesh

                from .sharding import shard

                shard(whole, init_device_mesh(self.team.device.type, (self.team.size,)))
            made = whole
            if self.ranks.size > 1:
                made = UlyssesBackbone(whole, self.ranks)
                held, rank = made.scheme.of(self.ranks.rank), self.ranks.rank
                self.part = Part(heads=held, asked=made.asked, counts=rank % made.scheme.group == 0)
                self.notes = [line for line in [made.scheme.text()] if line]
        return made

    def attention(self, backbone: Any, attention: Attention) -> Attention:
        """What attends to this process's history."""
        return backbone.attention_over(attention) if isinstance(backbone, UlyssesBackbone) else attention

    def loaded(self, histories: Mapping[Hashable, Snapshot] | None) -> dict[Hashable, Snapshot] | None:
        """This process's part of the clean history to start from."""
        return None if histories is None else {name: self.part.of(whole) for name, whole in histories.items()}

    def run(self, run: RunSettings) -> RunSettings:
        """This process's part of a run over a history or of a window, whose backbone is `backbone`'s."""
        self.check(run.settings, run.schedule.max_active, run.seeing)
        guidance: Any = run.guidance
        if isinstance(guidance, WeightedGuidance) and self.scheme == "pipeline":
            guidance = OneByOne(guidance)
        elif isinstance(guidance, WeightedGuidance) and self.peers is not None and len(guidance.texts) == 2:
            guidance = DividedBranches(guidance, self.peers)
            self.part = replace(self.part, branches=tuple(map(str, guidance.texts)))
        return replace(
            run,
            guidance=guidance,
            branches=len(guidance.texts),
            attention=self.attention(run.backbone, run.attention),
            loaded=self.loaded(run.loaded),
            cancelled=lambda: False,  # asked once a tick, by `engine`, for all have to agree
        )

    def check(self, settings: Settings, max_active: int, seeing: str = "causal") -> None:
        """Raises UserError for a run that cannot be divided so."""
        if self.scheme == "pipeline" and settings.history.type != "as computed" and max_active > 1:
            raise UserError(
                f"A history in {settings.history.type} and several active chunks cannot go through a pipeline of "
                "layers, where every layer stores active chunks; take the scheme ulysses, or the history as computed."
            )
        if self.scheme == "pipeline" and seeing != "causal" and self.ranks.size > 1:
            raise UserError(f"A window of {seeing} attention is one piece, which no pipeline divides; take ulysses.")

    def engine(self, engine: Engine, cancelled: Callable[[], bool]) -> Engine:
        """Has all processes agree: on what a pipeline's last one computes, on whether to go on, on what is kept."""
        engine.forward = _Agreed(engine.forward, self)
        engine.cancelled = lambda: self.team.any(cancelled())
        engine.report.notes += self.notes
        return engine

    def whole(self, mine: Mapping[Hashable, Snapshot]) -> dict[Hashable, Snapshot]:
        """Puts a history together in the first process, of all processes' parts; elsewhere there is none."""
        told = self._keeping.objects(
            [self.part, [(str(name), [(tuple(x.shape), x.dtype) for x in snapshot]) for name, snapshot in mine.items()]]
        )
        if not self.first:
            if self.part.counts:
                for snapshot in mine.values():
                    for tensor in snapshot:
                        self._keeping.send(tensor.cpu(), 0)()
            return {}
        parts: dict[str, list[tuple[Part, Snapshot]]] = {}
        for rank, (part, shapes) in enumerate(told):
            if not part.counts:
                continue
            for name, sizes in shapes:
                if rank == 0:
                    snapshot = next(own for branch, own in mine.items() if str(branch) == name)
                else:
                    snapshot = Snapshot(*(torch.empty(shape, dtype=dtype) for shape, dtype in sizes))
                    for tensor in snapshot:
                        self._keeping.receive(tensor, rank)
                parts.setdefault(name, []).append((part, snapshot))
        names = {str(name): name for name in mine}
        return {names.get(name, name): _joined(some) for name, some in parts.items()}


def _joined(parts: Sequence[tuple[Part, Snapshot]]) -> Snapshot:
    """One branch's history of its parts, in order."""
    dim = 0 if parts[0][0].layers is not None else 2
    every = [list(tensors) for tensors in zip(*(snapshot for _, snapshot in parts), strict=True)]
    return Snapshot(*(tensors[0] if not tensors[0].numel() else torch.cat(tensors, dim) for tensors in every))


def halved(scheme: Scheme, branches: int, processes: int) -> bool:
    """Whether each half of the processes takes one of two branches of guidance."""
    return scheme == "ulysses" and branches == 2 and processes % 2 == 0


def planned_part(sizes: NetworkSizes, scheme: Scheme, processes: int, branches: int) -> tuple[NetworkSizes, int]:
    """What the first of so many processes will have of a network and of its branches, before there are any of them."""
    if scheme == "pipeline":
        layers = len(shares(sizes.layers, processes)[0])
        return replace(sizes, layers=layers, text_width=sizes.text_width // sizes.layers * layers), branches
    groups = 2 if halved(scheme, branches, processes) else 1
    ranks = processes // groups
    return (sizes_of_part(sizes, head_scheme(sizes.kv_heads, ranks), 0) if ranks > 1 else sizes), branches // groups


def agreed(values: Sequence[Tensor], parallel: Parallel) -> list[Tensor]:
    """Velocities as the processes that know them say: of a pipeline, the last one; else each knows them."""
    pipeline = parallel.pipeline
    if pipeline is None or not values:
        return list(values)
    whole = torch.cat([value.reshape(-1) for value in values])
    whole = parallel.ranks.spread(whole, pipeline.ranks.size - 1)
    pipeline.settle()
    pieces = whole.split([value.numel() for value in values])
    return [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]


class _Agreed:
    """A forward of which this process has a part; whatever is not said here is the part's own."""

    def __init__(self, forward: Any, parallel: Parallel):
        self._forward, self._parallel = forward, parallel

    def __getattr__(self, name: str):
        return getattr(self._forward, name)

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """The velocities of a tick, the same in every process."""
        answers = self._forward.velocities(steps)
        values = agreed([answer.value for answer in answers], self._parallel)
        return [answer._replace(value=value) for answer, value in zip(answers, values, strict=True)]

    def save(self) -> dict[Hashable, Snapshot]:
        """The whole clean history, in the first process."""
        return self._parallel.whole(self._forward.save())

    def begin_delta(self, full: bool) -> Callable[[], SnapshotDelta]:
        """What the whole clean history has grown by, in the first process; all of them call both."""
        delta = self._forward.begin_delta(full)

        def whole() -> SnapshotDelta:
            mine = delta()
            return mine._replace(histories=self._parallel.whole(mine.histories))

        return whole
