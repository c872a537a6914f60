"""The models that people run, with their real shapes on the "meta" device, and what their runs ask of a device.

No run is gone through whole. In the middle of a run every chunk costs the same, but for the history that it sees: the
real forward is driven through the ticks of one lag, in which one chunk begins and one becomes clean, with one layer and
with two of each kind, for layers of a kind are alike. What each forward of a run sees of the past follows from the
schedule alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..engine.build import RunSettings, build_engine
from ..engine.causal import CausalForward
from ..engine.forward import Step, Velocity
from ..engine.guidance import classifier_free
from ..engine.layers import has_stacks
from ..engine.loop import Engine, Sampling
from ..engine.pictures import Scene
from ..history import cache
from ..history.cache import Attention, History
from ..history.positions import RotaryProduct
from ..models.experts import ExpertsBackbone
from ..models.families import Family, family, solver_of
from ..models.longvie import HISTORY_FRAMES, STREAMS, LongVieConfig
from ..models.magi.config import MAGI_4_5B, MAGI_24B, MagiConfig, magi_usual
from ..models.magi.forward import magi_engine, magi_schedule
from ..models.magi.network import MagiBackbone, MagiNetwork, MagiText, grouped_attention
from ..models.magi.sampling import CHUNK_FRAMES
from ..models.magi.text import null_text
from ..models.memory import latent_size
from ..models.presets import preset
from ..models.wan import FRAME_STRIDE, TEXT_TOKENS, WanBackbone, WanConfig
from ..schedule import ChunkSchedule, Place
from ..settings import OFF, Compression, Settings
from .meter import Meter, Work, attention_kernel

META = torch.device("meta")
IMAGE_TOKENS = 257  # of the image encoder
WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_5B = WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)


@dataclass(frozen=True)
class Model:
    """A model at one size, as its makers run it, in bfloat16.

    Attributes:
        family_name: a key of `models.families.FAMILIES`.
        config: of its network.
        size: width and height in pixels.
        budget: clean chunks, where there is a budget; 0 of a model that keeps no history.
        cut: how a history is cut to it, or None for what a preset does.
    """

    name: str
    family_name: str
    config: WanConfig | MagiConfig
    size: tuple[int, int]
    budget: int
    cut: Compression | None = None

    @property
    def family(self) -> Family:
        return family(self.family_name)

    @property
    def layers(self) -> int:
        return self.config.layers if isinstance(self.config, MagiConfig) else self.config.num_layers

    @property
    def led(self) -> int:
        """How many of the layers have control blocks beside them: those are layers of another kind."""
        return self.config.control_layers if isinstance(self.config, LongVieConfig) else 0

    @property
    def networks(self) -> int:
        """How many networks of these sizes it is made of; a step runs one, a clean pass all of them."""
        return 1 if self.family.boundary is None else 2

    @property
    def chunk_frames(self) -> int:
        return CHUNK_FRAMES if isinstance(self.config, MagiConfig) else self.family.chunk_frames

    @property
    def pictures(self) -> int:
        """Frames of a chunk; one that keeps no history is a video of its own, of which the first latent frame is one
        picture."""
        return FRAME_STRIDE * self.chunk_frames - (0 if self.budget else FRAME_STRIDE - 1)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of a chunk's latent, [1, C, T, H, W]."""
        channels = self.config.channels if isinstance(self.config, MagiConfig) else self.config.out_dim
        width, height = latent_size(self.size, channels)
        return 1, channels, self.chunk_frames, height, width

    def chunks(self, minutes: float = 1.0) -> int:
        """Counts the chunks of a video of so many minutes, the last one whole."""
        return -int(-60 * minutes * self.family.fps // self.pictures)

    def schedule(self, chunks: int) -> ChunkSchedule:
        """Makes the schedule of a run of so many chunks."""
        if isinstance(self.config, MagiConfig):
            return magi_schedule(chunks * CHUNK_FRAMES, magi_usual(self.config)[0])
        return ChunkSchedule(chunks, self.family.steps, self.family.lag)

    def settings(self, preset_name: str, bounded: bool) -> Settings:
        """Gives a preset with or without the model's budget; "plain" recomputes every step."""
        budget = self.budget if bounded else None
        named = preset("off" if preset_name == "plain" else preset_name, budget, self.cut)
        return named if bounded else replace(named, history=OFF.history)

    def recomputes_all(self, settings: Settings) -> bool:
        """Says whether these settings reuse nothing on this model's schedule."""
        schedule = self.schedule(self.chunks())
        return settings.reuse.policy(schedule).recomputed(schedule.steps) == frozenset(range(schedule.steps))

    def network(self, layers: int, device: torch.device = META, led: int = 0) -> nn.Module:
        """Makes the network, or all networks, with so many layers and torch's own random weights, which are none on
        "meta".

        Args:
            led: how many of the layers have control blocks beside them.
        """
        with device:
            network: nn.Module
            if isinstance(self.config, MagiConfig):
                network = MagiNetwork(replace(self.config, layers=layers), torch.bfloat16, device)
            else:
                several = [_wan_network(self.config, layers, led) for _ in range(self.networks)]
                network = nn.ModuleList(several) if len(several) > 1 else several[0]
        return network.requires_grad_(False).eval()

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Adds up the weights' bytes, those of the blocks' matrices at so many bytes a number."""

        def size(layers: int, led: int = 0) -> int:
            return _weight_bytes(self.network(layers, led=led), itemsize)

        one = size(1)
        a_layer = size(2) - one
        beside = size(1, 1) - one if self.led else 0
        return one + (self.layers - 1) * a_layer + self.led * beside

    def backbone(self, network: nn.Module, attention: Attention = grouped_attention) -> Any:
        """Makes what runs a network by layers, or those that `network` made; `attention` is for the text."""
        if isinstance(network, MagiNetwork):
            return MagiBackbone(network, attention)
        if isinstance(network, nn.ModuleList):
            high, low = (WanBackbone(one, attention) for one in network)
            return ExpertsBackbone(high, low)
        return self.family.backbone(network, self.family.fps, attention)

    def metered(self, layers: int, settings: Settings, chunks: int, meter: Meter, led: int = 0) -> Engine:
        """Puts a run together on a network with so many layers, of which so many are led; what it computes is counted
        by the meter.

        Attention over the history is counted as a part of its own, "attention".
        """

        def over_history(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with meter.part("attention"):
                return meter.attention(q, k, v)

        backbone = self.backbone(self.network(layers, led=led), meter.attention)
        product = RotaryProduct(partial(torch.repeat_interleave, repeats=2, dim=0), meter.turn)  # a matrix has four
        backbone.rotary = replace(backbone.rotary, product=product)
        with meter:
            return self.engine(backbone, settings, chunks, _empty, META, over_history)

    def engine(
        self,
        backbone: Any,
        settings: Settings,
        chunks: int,
        draw: Callable[..., Tensor],
        device: torch.device,
        attention: Attention = grouped_attention,
    ) -> Engine:
        """Puts a run together on a backbone of this model's.

        Args:
            draw: makes a tensor of a shape, in the network's precision on the device: noise and texts.
            attention: over the history.
        """
        schedule = self.schedule(chunks)
        if isinstance(backbone, MagiBackbone):
            width, tokens = backbone.config.caption_width, backbone.config.caption_tokens
            text = MagiText(draw(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool))
            return magi_engine(
                backbone, schedule, settings, lambda chunk: text,
                null_text(text.embedding[0]), lambda chunk: draw(*self.shape),
                shape=self.shape, device=device, attention=attention,
            )  # fmt: skip
        assert isinstance(self.config, WanConfig)
        usual, width = self.family, self.config.text_dim
        guidance = classifier_free(draw(1, TEXT_TOKENS, width), draw(1, TEXT_TOKENS, width), usual.guidance)
        noise = draw(*self.shape)
        sampling = Sampling(
            usual.levels(usual.steps), lambda chunk: noise, lambda chunk, step: noise,
            solver_of(backbone, usual.solver(usual.steps)),
        )  # fmt: skip
        run = RunSettings(
            backbone, guidance, schedule, settings, sampling, usual.attention,
            self.shape, len(guidance.texts), torch.bfloat16, device, text_tokens=TEXT_TOKENS, attention=attention,
            scenes=partial(_scene, self, draw),
        )  # fmt: skip
        return build_engine(run)


def _wan_network(config: WanConfig, layers: int, led: int) -> nn.Module:
    config = replace(config, num_layers=layers)
    if isinstance(config, LongVieConfig):
        config = replace(config, control_layers=led)
    network = config.network().to(torch.bfloat16)
    network.patch_embedding.float()  # as in ComfyUI
    return network


def _scene(model: Model, draw: Callable[..., Tensor], chunk: int, before: Tensor | None) -> Scene:
    """What a chunk behind another one is shown."""
    assert isinstance(model.config, LongVieConfig)
    rows, channels, frames, *size = model.shape
    shown = model.config.in_dim - channels
    controls = tuple(draw(rows, channels + shown, frames, *size) for _ in STREAMS)
    return Scene(
        draw(rows, shown, frames, *size),
        draw(rows, IMAGE_TOKENS, model.config.image_dim),
        controls,
        draw(rows, channels, HISTORY_FRAMES, *size),
    )


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def _weight_bytes(network: nn.Module, itemsize: int) -> int:
    narrow = {name for name, weight in network.named_parameters() if "blocks." in name and weight.ndim > 1}
    return sum(
        weight.numel() * (min(itemsize, weight.itemsize) if name in narrow else weight.itemsize)
        for name, weight in network.named_parameters()
    )


MODELS = (
    Model("Self-Forcing 1.3B", "causal", WAN_1_3B, (832, 480), 3),
    Model("LongLive 1.3B", "longlive", WAN_1_3B, (832, 480), 3, Compression("window", sink=3)),
    Model("LongLive 2.0 5B", "longlive 2", WAN_5B, (1280, 704), 3, Compression("window", sink=8)),
    Model("Krea Realtime 14B", "krea", WAN_14B, (832, 480), 1),  # computed anew instead of the clean pass: as much work
    Model("Wan 2.2 Self-Forcing A14B", "experts", WAN_14B, (832, 480), 3),
    Model("LongVie 2 14B", "longvie", LongVieConfig(5120, 13824, 40, 40), (640, 352), 0),
    Model("SkyReels-V2 1.3B", "skyreels", replace(WAN_1_3B, fps=True), (960, 544), 2),
    Model("SkyReels-V2 14B", "skyreels", WAN_14B, (960, 544), 1),
    Model("SkyReels-V2 14B", "skyreels", WAN_14B, (1280, 720), 1),
    Model("MAGI-1 4.5B", "magi", MAGI_4_5B, (720, 720), 5),
    Model("MAGI-1 4.5B", "magi", MAGI_4_5B, (1280, 720), 5),
    Model("MAGI-1 24B", "magi", MAGI_24B, (1280, 720), 5),
)


def model_of(family_name: str) -> Model:
    """Gives the first model of a family."""
    return next(model for model in MODELS if model.family_name == family_name)


@dataclass(frozen=True)
class Tick:
    """What the loop asks of its forward in one tick: the places to recompute, and the chunk that is finished then."""

    places: Sequence[Place]
    finished: int | None


@dataclass(frozen=True)
class Steady:
    """The ticks of one lag in the middle of a run, as counted with one number of layers.

    Attributes:
        ticks: what was asked for.
        network: all work of the forwards but what follows.
        attention: over the history.
        cut: of the one chunk that goes over the budget.
        solver: everything beside the forwards.
        passes: chunks that went through the network, a batch of branches counted once.
        history, held, activations: bytes of the history; of what else stayed (texts' keys, tables); the peak above.
    """

    ticks: Sequence[Tick]
    network: Work
    attention: Work
    cut: Work
    solver: Work
    passes: int
    history: int
    held: int
    activations: int

    @cached_property
    def whole(self) -> Work:
        return self.network + self.attention + self.cut + self.solver

    @property
    def asked(self) -> frozenset[int]:
        """Steps of a chunk that are recomputed."""
        return frozenset(place.step for tick in self.ticks for place in tick.places if place.step is not None)

    def in_layers(self, two: "Steady", layers: int) -> "Steady":
        """Gives what a network with so many layers takes, from one layer (this) and two."""
        return self.with_layers(self, two, layers - 1)

    def with_layers(self, one: "Steady", two: "Steady", more: int) -> "Steady":
        """Gives what a network with so many more layers takes, each as the one by which two others differ."""
        assert (self.ticks, self.passes) == (one.ticks, one.passes) == (two.ticks, two.passes)

        def work(name: str) -> Work:
            return getattr(self, name).plus(getattr(two, name) - getattr(one, name), more)

        def size(name: str) -> int:
            return getattr(self, name) + more * (getattr(two, name) - getattr(one, name))

        return Steady(
            self.ticks,
            work("network"),
            work("attention"),
            work("cut"),
            work("solver"),
            self.passes,
            size("history"),
            size("held"),
            max(self.activations, two.activations),
        )


def count_steady(model: Model, layers: int, settings: Settings, led: int = 0) -> Steady:
    """Counts the ticks of one lag in the middle of a run of a minute."""
    meter, chunks = Meter(), model.chunks()
    engine = model.metered(layers, settings, chunks, meter, led)
    history, forward = meter.alive, engine.forward
    meter.take()
    first = first_steady(engine)
    with torch.inference_mode(), _cuts_apart(meter):
        ticks = asked_ticks(engine, first, lambda: meter)
        solver = meter.take()[""]
    with torch.inference_mode(), _cuts_apart(meter), meter:
        empty = _empty(*model.shape)
        fill(engine, first, empty)
        meter.take()
        meter.reset_peak()
        before = meter.alive
        engine.sampling.start(first)  # a chunk that is shown something is so once
        meter.take()
        passes = _passes(engine)
        for tick in ticks:
            drive(engine, tick, empty)
        counted = meter.take()
    nothing = Work()
    return Steady(
        ticks,
        counted[""],
        counted.get("attention", nothing),
        counted.get("cut", nothing),
        solver,
        passes=len(passes),
        history=forward.history_bytes[1],
        held=before - history,
        activations=meter.peak - before,
    )


def first_steady(engine: Engine) -> int:
    """The chunk that begins when the window is full, and so is a budget."""
    settings = getattr(engine.forward, "settings", OFF)  # of a window: it keeps no history
    return engine.schedule.max_active + (1 if settings.history.budget is None else settings.history.budget)


def _fills_at_once(forward) -> bool:
    """Whether the chunk that is finished right before the lag is in the history when it begins, and may fill it."""
    return isinstance(forward, CausalForward) and forward.plan.kind == "shared"


def asked_ticks(engine: Engine, first: int, inside: Callable[[], AbstractContextManager] = nullcontext) -> list[Tick]:
    """Runs the loop up to the end of the lag in which chunk `first` begins, on a forward that does nothing; gives what
    it asks for in that lag.

    Args:
        inside: is entered for each of the lag's ticks.
    """
    asked: list[Place] = []
    finished: list[int] = []

    def velocities(steps: Sequence[Step]) -> list[Velocity]:
        asked.extend(step.place for step in steps)
        return [Velocity(torch.empty_like(step.x), ("",)) for step in steps]

    ticks: list[Tick] = []
    lag, forward = engine.schedule.lag, engine.forward
    finish = patch.object(forward, "finish", lambda chunk, latent: finished.append(chunk))
    with patch.object(forward, "velocities", velocities), finish:
        for number in range((first + 1) * lag):
            asked.clear()
            finished.clear()
            with inside() if number >= first * lag else nullcontext():
                engine._tick(number, engine.schedule.active(number))
            if number >= first * lag:
                ticks.append(Tick(tuple(asked), finished[0] if finished else None))
    engine.active, engine.advanced = [], []
    return ticks


def fill(engine: Engine, first: int, latent: Tensor) -> None:
    """Brings the real forward to where chunk `first` begins, in as few passes as that takes."""
    oldest = first - engine.schedule.max_active
    for chunk in range(1 if _fills_at_once(engine.forward) else 0, oldest):
        engine.forward.give(chunk, latent, 0.0)
    last = engine.schedule.active(first * engine.schedule.lag - 1)
    drive(engine, Tick(last, last[0].chunk), latent)  # type: ignore[arg-type]


def drive(engine: Engine, tick: Tick, latent: Tensor) -> None:
    """Asks the real forward for a tick."""
    sigmas, forward = engine.sampling.sigmas, engine.forward
    steps = [Step(latent, sigmas[place.step or 0], place) for place in tick.places]
    if steps:
        forward.velocities(steps)
    if tick.finished is not None:
        forward.finish(tick.finished, latent)


def _passes(engine: Engine) -> list[int]:
    """A list that grows by one whenever a chunk goes through the first layer of a network."""
    backbone: Any = engine.forward.backbone  # type: ignore[attr-defined]
    passes: list[int] = []

    def counted(block: Callable[..., Tensor], layer: int, *what) -> Tensor:
        if layer == 0:
            passes.append(layer)
        return block(layer, *what)

    for one in [backbone.high, backbone.low] if has_stacks(backbone) else [backbone]:
        one.block = partial(counted, one.block)
    return passes


@contextmanager
def _cuts_apart(meter: Meter) -> Iterator[None]:
    """Inside, what histories do to cut themselves is counted as a part of its own, "cut"."""

    def evict(compression, keys, parts, queries, keep, frame_tokens, chunk_tokens, layer, stays) -> list[Tensor]:
        """All layers, and all runs with the same budget, cut alike."""
        shapes = [None if part is None else (part.shape, part.stride(), part.dtype) for part in (keys, queries, *parts)]
        key = ("evict", compression, *shapes, keep, frame_tokens, chunk_tokens)
        work = partial(evict_all, compression, keys, parts, queries, keep, frame_tokens, chunk_tokens, layer, stays)
        return list(meter.once(key, work))

    evict_all = cache.evict
    with patch.object(cache, "evict", evict), cutting_inside(partial(meter.part, "cut")):
        yield


@contextmanager
def cutting_inside(entered: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """While it is on, histories cut themselves inside what is entered for each piece of that work."""

    def within(work):
        def cutting(*what):
            with entered():
                return work(*what)

        return cutting

    with patch.multiple(History, _cut_layer=within(History._cut_layer), close_layer=within(History.close_layer)):
        yield


def seen_chunks(
    schedule: ChunkSchedule, recomputed: frozenset[int], budget: int | None, networks: int = 1
) -> Counter[int]:
    """Counts a causal run's forwards by how many chunks they see, their own included; clean passes count.

    Args:
        recomputed: steps of a chunk, the same for all; on the same ticks for all active chunks.
        budget: clean chunks that are kept.
        networks: that a clean pass goes through, one chunk at a time.
    """
    seen: Counter[int] = Counter()
    clean = waiting = 0
    most = schedule.total_chunks if budget is None else budget
    at_once = budget is not None or schedule.max_active == 1
    for places in schedule:
        asked = sum(place.step in recomputed for place in places)
        if asked:
            seen.update(clean + number + 1 for number in range(waiting + asked))
            clean, waiting = min(clean + waiting, most), 0
        for place in places:
            if place.step == schedule.steps - 1:
                if at_once:
                    seen[clean + 1] += networks
                    clean = min(clean + 1, most)
                else:
                    waiting += 1
    seen.update(clean + number + 1 for number in range(waiting))
    return seen


def attention_work(model: Model, seen: Counter[int], branches: int) -> Work:
    """Gives the attention over the history of forwards that see so many chunks, in all layers and branches."""
    assert isinstance(model.config, WanConfig)
    heads, (_, _, frames, height, width) = model.config.num_heads, model.shape
    _, patch_height, patch_width = model.config.patch_size
    tokens = frames * -(-height // patch_height) * -(-width // patch_width)
    work = Work()
    for count, times in seen.items():
        past = torch.Size((1, heads, count * tokens, model.config.dim // heads))
        kernel = attention_kernel(torch.Size((*past[:2], tokens, past[3])), past, past, 2)
        work.kernels[kernel] += times * branches * model.layers
    return work
