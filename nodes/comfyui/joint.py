"""Runs in the host whose chunks go through the network together: SkyReels-V2 and Rolling Forcing as upstream runs
them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...flowcache_core.engine.joint import JointGuidance
from ...flowcache_core.engine.rolling import RollingDenoise, RollingHistory
from ...flowcache_core.history.settings import HistoryShape
from . import patch as host


class JointRun(host.HostRun):
    """A run whose chunks go through the network together. Each branch has what denoises it, history included."""

    def __init__(self, model, options: dict, kind: Literal["joint", "rolling"], chunk_frames: int):
        super().__init__(model, options)
        self.kind, self.chunk_frames = kind, chunk_frames
        self.levels: Tensor | None = None  # noise level of each frame; None stores a finished chunk
        self.first = 0
        self.dtype = host.compute_dtype(model)
        self._denoise: dict[str, JointGuidance | RollingDenoise] = {}

    def forward(self, network: torch.nn.Module, x: Tensor, context: Tensor, options: dict) -> Tensor:
        """Stands in for the network's own forward, branch after branch. x [rows, C, T, H, W]."""
        names = self.names(options)
        rows = x.shape[0] // len(names)
        parts = []
        for name, part, text in zip(names, x.split(rows), context.split(rows), strict=True):
            if name not in self._denoise:
                self._denoise[name] = self._make(text)
            if self.levels is None:
                self._denoise[name].clean(part, self.first)
                parts.append(torch.zeros_like(part))
            else:
                parts.append(self._denoise[name](part, self.levels, self.first))
        return torch.cat(parts)

    def history_shape(self, chunk: Sequence[int], chunks: int) -> HistoryShape:
        """Sizes of a branch's history of so many chunks of shape [B, C, T, H, W]."""
        backbone, (batch, _, frames, *size) = self.backbone, chunk
        grid = backbone.grid(*size)
        return HistoryShape(backbone.layers, batch, backbone.heads, backbone.head_dim, grid, frames, chunks)

    def _make(self, text: Tensor) -> JointGuidance | RollingDenoise:
        if self.kind == "rolling":
            return RollingDenoise(self.backbone, text, RollingHistory(self.chunk_frames), self.attention)
        return JointGuidance(self.backbone, {"": text}, {"": 1.0}, self.attention)


@dataclass
class Window:
    """What a joint engine calls: the guider, at noise level 1 for all, where a clean estimate is x minus the velocity.

    The frames' own levels go beside it, since the host knows one level a call.
    """

    run: JointRun
    guided: Callable[[Tensor, float], Tensor]

    def __call__(self, x: Tensor, levels: Tensor, first: int) -> Tensor:
        self.run.levels, self.run.first = levels, first
        return x - self.guided(x, 1.0)

    def clean(self, x: Tensor, first: int) -> None:
        self.run.levels, self.run.first = None, first
        self.guided(x, 1.0)
