"""Published rules for a short history, written from their papers and code, on the demo model's whole history.

Every rule looks at the clean history of a layer and says what of it the active chunks see. All of it is kept in memory,
so that each choice can be made anew; the bytes told are those of what is seen. All get the same budget: what one head
is spared, another gets. Positions are absolute, as the demo model's plain run has them, so nothing is re-aligned.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.build import RunSettings, build_engine
from ..engine.causal import CausalForward, CausalSite
from ..engine.loop import Engine
from ..history.cache import Attention, Chunk, History
from ..history.compression import best_units


class Seen(NamedTuple):
    """What the active chunks see of the clean history.

    Attributes:
        keys, values: [B, heads, N, D].
        mask: which of them each head sees, bool [heads, N]; None for all.
        tokens: that are kept for it, a head's mean.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    tokens: float


@dataclass(frozen=True)
class Now:
    """A layer's clean history, and who asks.

    Attributes:
        layer: its number.
        q: queries of an active chunk, [B, heads, Q, D].
        keys, values: of the clean history, [B, heads, N, D].
        active: keys of the active chunks up to that one, [B, heads, M, D].
        frame, chunk: tokens of them.
        rows, columns: of a frame, in tokens.
        budget: tokens of the clean history that a head sees, on average.
        layers: of the network.
    """

    layer: int
    q: Tensor
    keys: Tensor
    values: Tensor
    active: Tensor
    frame: int
    chunk: int
    rows: int
    columns: int
    budget: int
    layers: int

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    def where(self, visible: Tensor) -> Seen:
        """Some tokens of each head, bool [heads, N]."""
        return Seen(self.keys, self.values, visible, visible.float().sum(dim=1).mean().item())

    def ends(self, first: int, last: int) -> Tensor:
        """The first and the last tokens, bool [N]."""
        place = torch.arange(self.count)
        return (place < first) | (place >= self.count - last)

    def masses(self, first: int, last: int = 0) -> Tensor:
        """Where the attention of each head lies: on so many first tokens, on those between, on so many last ones, on
        the active chunks; [4, heads]."""
        logits = self.q @ torch.cat([self.keys, self.active], dim=2).mT / self.q.shape[-1] ** 0.5
        weights = logits.softmax(dim=-1).mean(dim=(0, 2))  # [heads, N + M]
        parts = weights.split([first, self.count - first - last, last, self.active.shape[2]], dim=1)
        return torch.stack([part.sum(dim=1) for part in parts])


Rule = Callable[[Now], Seen]


@dataclass
class DummyForcing:
    """Dummy Forcing (arXiv 2601.20499): half of all heads look at the history least, and see its last frame alone; of
    the others, those that look at the first frame see the front, the rest a window.

    Heads are told apart once, by where their attention lies when the history is first over its budget. Left out: the
    published lengths of a frame or two; the other heads share what the budget leaves.
    """

    masses: dict[int, Tensor] = field(default_factory=dict)  # by layer, see `Now.masses`
    groups: Tensor | None = None  # int [layers, heads]: 0 front, 1 window, 2 dummy

    def __call__(self, now: Now) -> Seen:
        if self.groups is None:
            if now.layer not in self.masses:
                self.masses[now.layer] = now.masses(now.frame)
            if len(self.masses) == now.layers:
                self._tell_apart(torch.stack([self.masses[layer] for layer in range(now.layers)]))
            return now.where(now.ends(0, now.budget).expand(now.keys.shape[1], -1))
        share = (self.groups == 2).float().mean().item()
        rest = round((now.budget - share * now.frame) / (1 - share))
        choices = torch.stack([now.ends(rest, 0), now.ends(0, rest), now.ends(0, now.frame)])
        return now.where(choices[self.groups[now.layer]])

    def _tell_apart(self, masses: Tensor) -> None:
        """Groups heads by masses [layers, 4, heads]."""
        first, middle = (masses[:, part] / masses[:, part].sum() for part in (0, 1))
        self.groups = torch.where(first < middle, 1, 0)
        order = torch.maximum(first, middle).flatten().argsort()
        self.groups.view(-1)[order[: len(order) // 2]] = 2


@dataclass
class ForcingKV:
    """Forcing-KV (arXiv 2605.09681): heads that look at little but the active chunks and the frame before them are
    static, and see the first frame and the last one; the dynamic ones see the first frame, the last ones, and of those
    before them the patches that change most from frame to frame, as the first dynamic layer's keys say.

    Heads are told apart when the history is first over its budget, not on a profile made beforehand. The published
    dynamic part is a frame's worth from the last chunk; here it is what the budget leaves, from twice as many frames.
    """

    static: dict[int, Tensor] = field(default_factory=dict)  # by layer, bool [heads]
    patches: Tensor | None = None  # which tokens of the candidates stay, bool [candidates]
    STATIC, PATCHES = 0.8, 4  # share of the attention; patches of a frame

    def __call__(self, now: Now) -> Seen:
        if now.layer not in self.static:
            self.static[now.layer] = self._static(now)
        static = torch.cat(list(self.static.values())).float().mean().item()
        near = now.ends(now.frame, now.frame)
        spared = static * 2 * now.frame
        most = int((now.budget - spared) / max(1 - static, 1e-6)) // now.frame  # frames of a dynamic head
        dynamic = now.ends(now.frame, now.chunk)
        kept = max(0, most - 1 - now.chunk // now.frame)
        if kept:
            dynamic = dynamic | self._changing(now, kept)
        return now.where(torch.where(self.static[now.layer][:, None], near, dynamic))

    def _static(self, now: Now) -> Tensor:
        _, middle, last, active = now.masses(now.frame, now.frame)
        return (last + active) / (middle + last + active) >= self.STATIC

    def _changing(self, now: Now, kept: int) -> Tensor:
        """Of the frames before the last chunk, `kept` frames' worth of patches that are least like the next frame's;
        bool [N]."""
        end = now.count - now.chunk
        start = max(now.frame, end - 2 * kept * now.frame)
        if now.layer == 0 or self.patches is None or len(self.patches) != end - start:
            frames = now.keys[:, :, start : end + now.frame].transpose(1, 2).flatten(2).unflatten(1, (-1, now.frame))
            alike = F.cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1).mean(dim=0)  # [frames, tokens]
            size = now.frame // self.PATCHES
            scores = alike.unflatten(1, (self.PATCHES, size)).mean(dim=2).flatten()
            chosen = scores.argsort()[: kept * self.PATCHES]
            patches = torch.zeros(len(scores), dtype=torch.bool)
            patches[chosen] = True
            self.patches = patches.repeat_interleave(size)
        return F.pad(self.patches, (start, now.chunk))


def deep_forcing(now: Now) -> Seen:
    """Deep Forcing (arXiv 2512.05081): half of the budget is the front (deep sink), a chunk is recent, and the rest are
    the tokens between that the active chunk's queries, summed, point to most (participative compression).

    Left out: the sink's positions are not moved up to the window's; which tokens stay is chosen anew every time.
    """
    sink = now.budget // 2
    top = now.budget - sink - now.chunk
    scores = (now.q.sum(dim=2, keepdim=True) @ now.keys.mT)[:, :, 0]  # [B, heads, N]
    middle = best_units(scores[..., sink : now.count - now.chunk], top) + sink
    front = torch.arange(sink).expand(*middle.shape[:2], -1)
    recent = torch.arange(now.count - now.chunk, now.count).expand(*middle.shape[:2], -1)
    places = torch.cat([front, middle, recent], dim=2)[..., None].expand(-1, -1, -1, now.keys.shape[-1])
    return Seen(now.keys.gather(2, places), now.values.gather(2, places), None, float(places.shape[2]))


def pack_forcing(now: Now) -> Seen:
    """PackForcing's three parts (2026): the first chunk, the newest, and between them frames made smaller in space.

    Its network for that is trained; here a square of four tokens is averaged, keys as they are turned. The middle takes
    the newest frames that the budget has room for.
    """
    room = now.budget - 2 * now.chunk
    small = now.frame // 4
    start = max(now.chunk, now.count - now.chunk - room // small * now.frame)
    parts = []
    for whole in (now.keys, now.values):
        middle = whole[:, :, start : now.count - now.chunk]
        square = middle.unflatten(2, (-1, now.rows // 2, 2, now.columns // 2, 2)).mean(dim=(4, 6)).flatten(2, 4)
        parts.append(torch.cat([whole[:, :, : now.chunk], square, whole[:, :, -now.chunk :]], dim=2))
    return Seen(parts[0], parts[1], None, float(parts[0].shape[2]))


class RuledHistory(History):
    """The whole history, of which a rule shows a part once it is longer than the budget.

    Attributes:
        rule: that is asked.
        kept: tokens of a layer that it needs, at the most.
    """

    def __init__(self, *given, rule: Rule, budget: int, size: tuple[int, int], **more):
        super().__init__(*given, **more)
        self.rule, self.budget, self.size, self.kept = rule, budget, size, 0.0

    def attend(
        self, layer: int, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, attention: Attention, *more, **named
    ) -> Tensor:
        """Attends as a history does, to what the rule shows."""
        return super().attend(layer, chunk, q, k, v, partial(self._ruled, layer, attention), *more, **named)

    def _ruled(self, layer: int, attention: Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        plan, clean = self.plan, self.clean
        budget = self.budget * plan.chunk_tokens
        if clean <= budget:
            return attention(q, keys, values)
        now = Now(
            layer, q, keys[:, :, :clean], values[:, :, :clean], keys[:, :, clean:], plan.frame_tokens,
            plan.chunk_tokens, *self.size, budget, plan.network.layers,
        )  # fmt: skip
        seen = self.rule(now)
        self.kept = max(self.kept, seen.tokens)
        keys = torch.cat([seen.keys, now.active], dim=2)
        values = torch.cat([seen.values, values[:, :, clean:]], dim=2)
        if seen.mask is None:
            return attention(q, keys, values)
        mask = F.pad(seen.mask, (0, now.active.shape[2]), value=True)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, :, None])

    @property
    def bytes_used(self) -> int:
        """Of what the rule shows, and of the slots."""
        budget = self.budget * self.plan.chunk_tokens
        shown = self.clean if self.clean <= budget else self.kept
        width = 2 * self.plan.batch * self.plan.network.kv_heads * self.plan.network.head_dim * self.dtype.itemsize
        return int(self.plan.network.layers * width * (shown + self._slot_tokens))


class RuledForward(CausalForward):
    """A run over such a history; arguments as for both."""

    def __init__(self, *given, rule: Rule, budget: int, size: tuple[int, int], **more):
        self.rule, self.budget, self.size = rule, budget, size
        super().__init__(*given, **more)

    def _history(self, site: CausalSite) -> History:
        return RuledHistory(
            self.plan, site.positions, self.settings.history, self.dtype, self.keeps_slots, site.stream,
            rule=self.rule, budget=self.budget, size=self.size,
        )  # fmt: skip


def ruled_engine(run: RunSettings, *, rule: Callable[[], Rule], budget: int) -> Engine:
    """Makes a run over a history that a rule shows.

    Args:
        rule: makes it, for one run.
        budget: chunks.
    """
    size = run.backbone.grid(*run.shape[3:])
    return build_engine(run, partial(RuledForward, rule=rule(), budget=budget, size=size))


PUBLISHED_RULES: dict[str, Callable[[], Rule]] = {
    "Dummy Forcing": DummyForcing,
    "Forcing-KV": ForcingKV,
    "Deep Forcing": lambda: deep_forcing,
    "PackForcing": lambda: pack_forcing,
}
