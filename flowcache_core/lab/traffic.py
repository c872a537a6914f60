"""What several GPUs send one another for one video, and how fast they may be together: counted bytes, and an estimate.

Bytes are those of `parallel`, which its tests hold to the byte; the time of one GPU is the roofline's, of a tick that
recomputes everything. Neither scheme hides its traffic behind its work here, so the estimate is a careful one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..models.magi.config import MagiConfig
from ..parallel.heads import head_scheme
from ..parallel.ranks import shares
from ..parallel.ulysses import layer_numbers
from .real_size import Model

GPUS = (1, 2, 4, 8)
ITEM = 2  # bytes of a number, bfloat16


@dataclass(frozen=True)
class Link:
    """What joins GPUs.

    Attributes:
        rate: bytes a second that one GPU sends, while it receives as many.
        delay: seconds of an exchange, at least.
    """

    name: str
    rate: float
    delay: float


PCIE = Link("PCIe 4.0", 20e9, 20e-6)  # as `roofline.LINK`, through the processor
NVLINK = Link("NVLink", 360e9, 10e-6)  # 80% of an H100's 450 GB/s each way
ETHERNET = Link("10 GbE", 1.1e9, 60e-6)
LINKS = (NVLINK, PCIE, ETHERNET)


@dataclass(frozen=True)
class Shape:
    """What of a model decides its traffic.

    Attributes:
        layers, heads, kv_heads, head_dim, width: of the network.
        frame: tokens of a frame.
        frames: of a chunk.
        patch: numbers of a token's velocity.
        active: chunks that go through the network in a tick, clean passes included.
        branches: of guidance that can be divided.
        runs: of a chunk in a tick, all branches counted.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    frame: int
    frames: int
    patch: int
    active: float
    branches: int
    runs: int


def shape_of(model: Model) -> Shape:
    """Of a model with its published schedule."""
    schedule, config = model.schedule(1000), model.config
    _, channels, frames, height, width = model.shape
    active = (schedule.steps + 1) / schedule.lag
    if isinstance(config, MagiConfig):  # its branches share one history, so they are not divided
        grid, dim = (height // config.patch, width // config.patch), config.width
        patch, runs, branches = config.patch**2 * config.fed_channels, 2, 1
    else:
        grid, dim = (-(-height // config.patch_size[1]), -(-width // config.patch_size[2])), config.dim
        branches = runs = 1 if model.family.guidance == 1.0 else 2
        patch = prod(config.patch_size) * channels
    sizes = config.sizes
    return Shape(
        sizes.layers,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        dim,
        prod(grid),
        frames,
        patch,
        active,
        branches,
        runs,
    )


@dataclass(frozen=True)
class Shared:
    """A tick of one video on several GPUs.

    Attributes:
        sent: bytes that the busiest GPU sends.
        history: share of the history that the fullest holds.
        exchanges: that one waits for another.
        work: of one GPU's time, what each takes.
    """

    sent: float
    history: float
    exchanges: float
    work: float

    def speed(self, seconds: float, link: Link) -> float:
        """How many times as fast as one GPU that takes so long."""
        return seconds / (seconds * self.work + self.sent / link.rate + self.exchanges * link.delay)


def ulysses(shape: Shape, gpus: int) -> Shared:
    """Tokens and heads divided, after branches of guidance."""
    groups = 2 if shape.branches == 2 and gpus % 2 == 0 else 1
    ranks = gpus // groups
    runs = shape.active * shape.runs / groups
    velocity = 0.0 if groups == 1 else shape.active * shape.frames * shape.frame * shape.patch * ITEM
    if ranks == 1:
        return Shared(velocity, 1 / groups, shape.active if groups > 1 else 0, 1 / groups)
    scheme, places = head_scheme(shape.kv_heads, ranks), shares(shape.frame, ranks)
    asked, tokens = shape.heads // shape.kv_heads, shape.frames
    layer = max(layer_numbers(scheme, places, rank, asked, shape.head_dim, tokens) for rank in range(ranks))
    head = (ranks - 1) * len(places[0]) * shape.patch * shape.frames
    sent = runs * (shape.layers * layer + head) * ITEM + velocity
    held = (1 + scheme.wasted_memory) / gpus
    return Shared(sent, held, runs * (2 * shape.layers + 1), (1 + scheme.wasted_time) / gpus)


def pipeline(shape: Shape, gpus: int) -> Shared:
    """Layers divided; chunks and branches follow one another."""
    if gpus == 1:
        return Shared(0, 1, 0, 1)
    pieces = shape.active * shape.runs
    turns = pieces + gpus - 1  # until the last piece has passed the last stage
    a_piece = shape.frames * shape.frame * shape.width * ITEM
    fullest = len(shares(shape.layers, gpus)[0]) / shape.layers
    velocity = shape.active * shape.frames * shape.frame * shape.patch * ITEM * (gpus - 1)
    return Shared(turns * a_piece + velocity, fullest, turns, turns / pieces * fullest)


SCHEMES = {"ulysses": ulysses, "pipeline": pipeline}


def traffic_rows(models: Sequence[Model], tick_seconds: dict[tuple, float]) -> list[dict]:
    """What each model, scheme and number of GPUs takes.

    Args:
        tick_seconds: of one GPU, by a model's name and size.
    """
    rows = []
    for model in models:
        shape, seconds = shape_of(model), tick_seconds[(model.name, *model.size)]
        for name, scheme in SCHEMES.items():
            for gpus in GPUS:
                shared = scheme(shape, gpus)
                rows.append(
                    {
                        "model": model.name,
                        "size": list(model.size),
                        "scheme": name,
                        "gpus": gpus,
                        "sent": shared.sent,
                        "history": shared.history,
                        "speed": {link.name: shared.speed(seconds, link) for link in LINKS},
                    }
                )
    return rows
