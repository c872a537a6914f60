"""Rolling Forcing: all active chunks go through the network together and attend to each other both ways, and to a
bounded history of clean chunks: the first one (sink) and the newest ones.

Source: RollingForcing, pipeline/rolling_forcing_inference.py and wan/modules/causal_model.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..history.settings import HistoryShape
from ..models.rotary import rotate
from ..models.wan import Attention, WanBackbone
from ..schedule import Place
from .joint import JointEngine
from .loop import Chunk


def rolling_bytes(shape: HistoryShape, itemsize: int, span: int = 21) -> int:
    """What `RollingHistory` grows to in a run of shape.capacity chunks: keys and values of the sink and the newest
    ones."""
    others = span // shape.chunk_frames - 1
    kept = 1 + min(others, shape.capacity)
    return 2 * shape.layers * shape.batch * shape.heads * shape.head_dim * itemsize * shape.chunk_tokens * kept


@dataclass
class RollingHistory:
    """Keys and values of clean chunks, for one branch.

    Attributes:
        chunk_frames: frames of a chunk; the sink is the first chunk.
        span: frames that a query may attend to in all, its own window included.
    """

    chunk_frames: int = 3
    span: int = 21
    # By layer: keys that are not rotated and values of the sink; rotated keys and values of the others, oldest first.
    sink: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    recent: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        pairs = [*self.sink.values(), *(pair for chunks in self.recent.values() for pair in chunks)]
        return sum(keys.nbytes + values.nbytes for keys, values in pairs)

    def before_window(self, layer: int, first: int, frames: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """What a window of active chunks sees: the newest clean chunks that fit beside the sink and itself.

        Returns:
            Their keys and values, and the frame number that the sink is placed at, right before them.
        """
        room = self.span - frames - self.chunk_frames
        count = min(room, first - self.chunk_frames) // self.chunk_frames
        seen = self.recent[layer][-count:] if count > 0 else []
        return seen, first - self.chunk_frames * (len(seen) + 1)

    def before_clean(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """What a clean chunk sees: as many of the chunks before it as the span allows, with no sink beside them."""
        return self.recent.setdefault(layer, [])

    def add(self, layer: int, unrotated: Tensor, keys: Tensor, values: Tensor) -> None:
        if layer not in self.sink:
            self.sink[layer] = (unrotated, values)
        others = self.span // self.chunk_frames - 1  # beside the chunk that looks at them
        self.recent[layer] = [*self.recent[layer], (keys, values)][-others:]


@dataclass
class RollingDenoise:
    """Velocity of the active chunks over a history, and the clean pass that feeds the history.

    Attributes:
        backbone: runs the window.
        text: text embedding [B, tokens, width].
        history: of this run.
        attention: used over the window and the history.
    """

    backbone: WanBackbone
    text: Tensor
    history: RollingHistory
    attention: Attention = F.scaled_dot_product_attention

    def __post_init__(self):
        self.context = self.backbone.context(self.text)

    def __call__(self, x: Tensor, levels: Tensor, first: int) -> Tensor:
        table = self._table(x, first)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, table), rotate(k, table)
            if first > 0:
                seen, place = self.history.before_window(layer, first, x.shape[2])
                sink, sink_values = self.history.sink[layer]
                sink = rotate(sink, self._table(x[:, :, : self.history.chunk_frames], place))
                k = torch.cat([sink, *(keys for keys, _ in seen), k], dim=2)
                v = torch.cat([sink_values, *(values for _, values in seen), v], dim=2)
            return self.attention(q, k, v)

        return self._run(x, levels, attend)

    def clean(self, x: Tensor, first: int) -> None:
        """Runs a finished chunk [B, C, T, H, W] at noise level 0 and keeps its keys and values."""
        table = self._table(x, first)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, rotated = rotate(q, table), rotate(k, table)
            seen = self.history.before_clean(layer)
            self.history.add(layer, k, rotated, v)
            keys = torch.cat([*(keys for keys, _ in seen), rotated], dim=2)
            return self.attention(q, keys, torch.cat([*(values for _, values in seen), v], dim=2))

        self._run(x, torch.zeros(x.shape[2], device=x.device), attend)

    def _table(self, x: Tensor, first: int) -> Tensor:
        frames = torch.arange(first, first + x.shape[2], device=x.device)
        return self.backbone.rotary.table(frames, *self.backbone.grid(*x.shape[-2:]))

    def _run(self, x: Tensor, levels: Tensor, attend) -> Tensor:
        levels = levels.expand(x.shape[0], -1)
        return self.backbone.head(x, levels, self.backbone.trunk(x, levels, self.context, attend))


class CleaningDenoise(Protocol):
    """What a `RollingEngine` calls: a `RollingDenoise`, or the host's guider over one."""

    def __call__(self, x: Tensor, levels: Tensor, first: int) -> Tensor: ...

    def clean(self, x: Tensor, first: int) -> None: ...


@dataclass
class RollingEngine(JointEngine):
    """One run: a generator of finished chunks. Lag 1: at every tick the oldest active chunk becomes clean.

    Memory does not grow with the length of the video.
    """

    denoise: CleaningDenoise

    def _begin(self, places: Sequence[Place]) -> None:
        for place in places:
            if place.step == 0:
                self.latents[place.chunk] = self.start(place.chunk)

    def _chunks(self, steps: Mapping[int, int]) -> Sequence[int]:
        return list(steps)

    def _first_frame(self, places: Sequence[Place]) -> int:
        chunk = places[0].chunk
        return chunk * self.latents[chunk].shape[2]

    def _finish(self, chunk: int) -> Chunk:
        x = self.latents.pop(chunk)
        del self.solvers[chunk]
        self.denoise.clean(x, chunk * x.shape[2])
        self.report.chunks_done += 1
        return Chunk(chunk, x)
