"""How fast runs at real size are on a card, and whether the plan and the meter told the truth of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine.counted import peak_bytes, reset_peak
from ..engine.loop import Cancelled, Progress
from ..settings import HistoryType, Settings
from .meter import Work, in_layers
from .real_size import Model, Tick, asked_ticks, count_steady, cutting_inside, drive, fill, first_steady

CHUNKS_OF_A_RUN = 5


@dataclass(frozen=True)
class Setting:
    """What is timed: a preset, with the model's budget or the whole history, how that is stored, compiled or not."""

    preset: str
    bounded: bool = True
    type: HistoryType = "as computed"
    compiled: bool = False

    def __str__(self) -> str:
        words = [self.preset, "budget" if self.bounded else "whole history"]
        words += [self.type] if self.type != "as computed" else []
        return ", ".join([*words, "compiled"] if self.compiled else words)

    def of(self, model: Model) -> Settings:
        """FlowCache's settings for a model."""
        settings = model.settings(self.preset, self.bounded)
        return replace(settings, history=replace(settings.history, type=self.type))


SETTINGS = (
    Setting("plain"),
    Setting("balanced"),
    Setting("plain", compiled=True),
    Setting("balanced", type="int8"),
    Setting("balanced", type="int4"),
    Setting("high"),
    Setting("fast"),
    Setting("plain", bounded=False),
)


@dataclass(frozen=True)
class Timing:
    """Measured over a few ticks in the middle of a run; a chunk is worked out from them.

    Attributes:
        forward, tick, cut, chunk: seconds: a chunk with all branches through the network once; a tick in which the
            network is run; all layers' cuts of a chunk; a chunk's whole way.
        passes: that were timed.
        peak, planned: bytes beside the weights.
        busy: share of the time in which the device worked; None where it was not watched.
        launches, counted: of the tick that was watched, by the profiler and by the meter.
    """

    model: str
    setting: str
    forward: float
    tick: float
    cut: float
    chunk: float
    passes: int
    peak: int
    planned: int
    busy: float | None = None
    launches: int | None = None
    counted: int | None = None


class Watch:
    """Adds up the time of pieces of work on a device, without making it wait."""

    def __init__(self, device: torch.device):
        self.device, self._pieces = device, list[Callable[[], float]]()

    @contextmanager
    def piece(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pieces.append(lambda: begin.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            yield
            took = time.perf_counter() - begun
            self._pieces.append(lambda: took)

    @property
    def seconds(self) -> float:
        wait_for(self.device)
        return sum(piece() for piece in self._pieces)


def wait_for(device: torch.device) -> None:
    """Waits until a device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draws(device: torch.device) -> Callable[..., Tensor]:
    """Gives what makes noise and texts in bfloat16, of a seed."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def timings(model: Model, device: torch.device, until: float) -> Iterator[Timing]:
    """Times a model at every setting, most important first, until `until` (of `time.monotonic`)."""
    torch.manual_seed(0)
    backbone = model.backbone(model.network(model.layers, device))
    parts = backbone.parts
    for setting in SETTINGS:
        if time.monotonic() > until:
            return
        settings = setting.of(model)
        if setting.preset != "plain" and model.recomputes_all(settings):
            continue
        backbone.parts = parts
        if setting.compiled:
            backbone.compile(backend="inductor" if device.type == "cuda" else "eager")
        yield steady(model, backbone, setting, device, until)


@torch.inference_mode()
def steady(model: Model, backbone, setting: Setting, device: torch.device, until: float) -> Timing:
    """Times the ticks of one lag in the middle of a run of a minute, or those that the time reaches for."""
    weights = _allocated(device)
    _reset_peak(device)
    engine = model.engine(backbone, setting.of(model), model.chunks(), draws(device), device)
    first, latent = first_steady(engine), draws(device)(*model.shape)
    ticks = asked_ticks(engine, first)
    fill(engine, first, latent)
    wait_for(device)
    places = asked = 0
    seconds, cuts, watch = list[float](), 0, Watch(device)
    with cutting_inside(watch.piece):
        for tick in ticks:
            begun = time.perf_counter()
            drive(engine, tick, latent)
            wait_for(device)
            seconds.append(time.perf_counter() - begun)
            places += len(tick.places) + (tick.finished is not None)
            asked += bool(tick.places)
            cuts += tick.finished is not None
            if places and time.monotonic() > until:
                break
    cut, total = watch.seconds, sum(len(tick.places) + (tick.finished is not None) for tick in ticks)
    forward = (sum(seconds) - cut) / max(1, places)
    timing = Timing(
        model.name, str(setting), forward, sum(seconds) / max(1, asked), cut / max(1, cuts),
        forward * total + cut / max(1, cuts), places, peak_bytes(device) - weights, engine.forward.plan.device_bytes,  # type: ignore[attr-defined]
    )  # fmt: skip
    if setting == SETTINGS[0] and device.type == "cuda" and len(seconds) == len(ticks):
        busy, launches = _profiled(lambda: drive(engine, _next_chunks(ticks[0]), latent), device)
        counted = _counted(model, setting)
        timing = replace(timing, busy=busy, launches=launches, counted=round(counted.launches / len(ticks)))
    return timing


def whole_run(model: Model, device: torch.device, preset: str, until: float) -> dict:
    """Runs a short video from beginning to end with the whole history; seconds, forwards, and how far it came."""
    torch.manual_seed(0)
    backbone = model.backbone(model.network(model.layers, device))
    engine = model.engine(backbone, model.settings(preset, False), CHUNKS_OF_A_RUN, draws(device), device)
    ticks = 0

    def after(told: Progress) -> None:
        nonlocal ticks
        ticks = told.tick

    engine.on_progress = after
    engine.cancelled = lambda: time.monotonic() > until
    wait_for(device)
    begun = time.perf_counter()
    with suppress(Cancelled):
        for _ in engine.run():
            pass
    wait_for(device)
    report = engine.report
    return {
        "model": model.name,
        "preset": preset,
        "seconds": time.perf_counter() - begun,
        "forwards": report.forwards_executed,
        "ticks": ticks,
        "of": engine.schedule.ticks,
    }


def _next_chunks(tick: Tick) -> Tick:
    """The same tick, one chunk later."""
    places = [replace(place, chunk=place.chunk + 1) for place in tick.places if isinstance(place.chunk, int)]
    return Tick(places, None if tick.finished is None else tick.finished + 1)


def _profiled(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Share of the time in which the device worked, and its kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    wait_for(device)
    with torch.profiler.profile(activities=activities) as profile:
        begun = time.perf_counter()
        work()
        wait_for(device)
        took = time.perf_counter() - begun
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time_total for event in kernels) / 1e6 / took, len(kernels)


def _counted(model: Model, setting: Setting) -> Work:
    """A lag's work, as the meter counts it."""
    one, two = (count_steady(model, layers, setting.of(model)) for layers in (1, 2))
    return in_layers(one.whole, two.whole, model.layers)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
