"""Rolling Forcing: all active chunks go through the network together and attend to each other both ways, and to a
bounded history of clean chunks: the first one (sink) and the newest ones.

Source: RollingForcing, pipeline/rolling_forcing_inference.py and wan/modules/causal_model.py.
"""

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..history.plan import NetworkSizes
from ..history.positions import RotaryTables
from ..report import Report
from ..schedule import ChunkSchedule, Given, Place
from .forward import Step, Velocity
from .guidance import Again, Guidance, Texts
from .joint import WindowForward

SPAN = 21  # frames that a query may attend to in all, its own window included


def rolling_bytes(
    sizes: NetworkSizes, grid: tuple[int, int], schedule: ChunkSchedule, chunk_frames: int, rows: int, itemsize: int
) -> int:
    """Works out what the history of one branch grows to: keys and values of the sink and of the newest chunks.

    Args:
        sizes: of the network.
        grid: rows and columns of tokens of a frame.
        rows: videos.
        itemsize: bytes of a number.
    """
    kept = 1 + min(SPAN // chunk_frames - 1, schedule.total_chunks)
    tokens = rows * math.prod(grid) * chunk_frames * kept
    return 2 * tokens * sizes.layers * sizes.kv_heads * sizes.head_dim * itemsize


class RollingHistory:
    """Keys and values of clean chunks, for one branch.

    Args:
        layers: of the network.
        chunk_frames: frames of a chunk; the sink is the first chunk.
        span: frames that a query may attend to in all.
    """

    def __init__(self, layers: int, chunk_frames: int, span: int = SPAN):
        self.chunk_frames, self.span = chunk_frames, span
        # By layer: unrotated keys and values of the sink; rotated keys and values of the others, oldest first.
        self.sink: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.recent: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]

    @property
    def bytes(self) -> int:
        pairs = [*(pair for pair in self.sink if pair), *(pair for chunks in self.recent for pair in chunks)]
        return sum(keys.nbytes + values.nbytes for keys, values in pairs)

    def before_window(self, layer: int, first: int, frames: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Finds what a window of active chunks sees: the newest clean chunks that fit beside the sink and itself.

        Returns:
            Their keys and values, and the frame number that the sink is placed at, right before them.
        """
        room = self.span - frames - self.chunk_frames
        count = min(room, first - self.chunk_frames) // self.chunk_frames
        seen = self.recent[layer][-count:] if count > 0 else []
        return seen, first - self.chunk_frames * (len(seen) + 1)

    def add(self, layer: int, unrotated: Tensor, keys: Tensor, values: Tensor) -> None:
        """Takes a clean chunk, and drops the oldest one that no later chunk sees."""
        self.sink[layer] = self.sink[layer] or (unrotated, values)
        others = self.span // self.chunk_frames - 1  # beside the chunk that looks at them
        self.recent[layer] = [*self.recent[layer], (keys, values)][-others:]


class RollingForward(WindowForward):
    """The forwards of one run. Lag 1: at every tick the oldest active chunk becomes clean. Memory does not grow with
    the length of the video.

    Args:
        backbone, guidance, report, tables, attention, check: as for `WindowForward`.
        chunk_frames: latent frames of a chunk.
    """

    def __init__(self, backbone, guidance: Guidance, report: Report, chunk_frames: int, **more):
        super().__init__(backbone, guidance, report, **more)
        self.chunk_frames = chunk_frames
        self.histories: dict[Hashable, RollingHistory] = {}

    def give(self, chunk: int | Given, latent: Tensor, condition: float) -> None:
        """Refuses given frames."""
        raise UserError("Rolling Forcing takes no given frames; leave prefix and end away.")

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs all active chunks."""
        values, branches = self.guided(steps, self.network)
        return [Velocity(value, branches) for value in values]

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Runs a finished chunk at noise level 0 and keeps its keys and values; a short one is the last, which nobody
        looks at."""
        if latent.shape[2] < self.chunk_frames:
            return
        _, branches = self.guided([Step(latent, 0.0, Place(chunk, None, 0))], self.network)
        self.report.clean_passes += len(branches)

    @property
    def history_bytes(self) -> tuple[int, int]:
        """Bytes of history; all of it is in use."""
        total = sum(history.bytes for history in self.histories.values())
        return total, total

    def network(
        self, steps: Sequence[Step], branches: Sequence[Hashable], texts: Texts, backbone: Any | None = None
    ) -> list[Tensor]:
        chunk, whole = steps[0].place.chunk, sum(step.x.shape[2] for step in steps)
        assert isinstance(chunk, int)
        site = self.sites.of(backbone, steps[0].x.device)
        first, rows = chunk * self.chunk_frames, steps[0].x.shape[0] // len(branches)
        histories = [self._history_of(name) for name in branches]
        window = partial(
            self._attend_clean if steps[0].place.is_clean_pass else self._attend, site.tables, first, whole
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(histories, q.split(rows), k.split(rows), v.split(rows), strict=True)
            return torch.cat([window(history, layer, *qkv) for history, *qkv in parts])

        return self.run(site, steps, texts, attend)

    def _attend(
        self, tables: RotaryTables, first: int, frames: int, history: RollingHistory, layer: int, q, k, v
    ) -> Tensor:
        table = tables.of(first, frames)
        q, k = self.turn(q, table), self.turn(k, table)
        sink = history.sink[layer]
        if first > 0 and sink is not None:
            seen, place = history.before_window(layer, first, frames)
            turned = self.turn(sink[0], tables.of(place, self.chunk_frames))
            k = torch.cat([turned, *(keys for keys, _ in seen), k], dim=2)
            v = torch.cat([sink[1], *(values for _, values in seen), v], dim=2)
        return self.attention(q, k, v)

    def _attend_clean(
        self, tables: RotaryTables, first: int, frames: int, history: RollingHistory, layer: int, q, k, v
    ) -> Tensor:
        """A clean chunk sees as many of the chunks before it as the span allows, with no sink beside them."""
        table = tables.of(first, frames)
        q, rotated = self.turn(q, table), self.turn(k, table)
        seen = list(history.recent[layer])
        history.add(layer, k, rotated, v)
        keys = torch.cat([*(keys for keys, _ in seen), rotated], dim=2)
        return self.attention(q, keys, torch.cat([*(values for _, values in seen), v], dim=2))

    def _history_of(self, branch: Hashable) -> RollingHistory:
        branch = branch.branch if isinstance(branch, Again) else branch
        return self.histories.setdefault(branch, RollingHistory(self.backbone.layers, self.chunk_frames))
