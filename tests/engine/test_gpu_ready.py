"""What a CPU can show of a run on a GPU: when the host would wait, what is copied, how attention is called."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.history.cache import History
from flowcache_core.history.offload import OffloadableBuffer
from flowcache_core.models.magi import forward as magi_forward
from flowcache_core.models.magi import sampling as magi_sampling
from flowcache_core.models.magi.forward import MagiSampling, magi_engine, magi_schedule
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork, MagiText
from flowcache_core.models.magi.sampling import VISIBLE_CHUNKS, sigmas
from flowcache_core.models.presets import PRESETS
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone, WanNetwork
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Between, Drift, Fixed, HistorySettings, Settings
from flowcache_core.solvers.multistep import UniPC
from flowcache_core.solvers.noise_levels import linear
from flowcache_core.solvers.one_step import Renoise
from tests.helpers.device_log import GPU, Log, on_gpu, pretended_gpu
from tests.helpers.histories import fails_at, room
from tests.helpers.magi_weights import SMALL
from tests.helpers.runs import build
from tests.helpers.tiny import TINY

WAN = replace(TINY, num_layers=1)
SKYREELS = replace(WAN, fps=True)
MAGI = replace(SMALL, layers=1)
MAGI_DISTILLED = replace(MAGI, distilled=True)
MAGI_SIGMAS = sigmas(4)  # worked out by torch, which would make them up in the pretended world
SCHEDULE = ChunkSchedule(4, 4, 2)
WATCHING = {
    "flowcache": PRESETS["paper fast"],
    "teacache": Settings(Drift(0.1, whole_window=True)),
}
NOT_WATCHING = {
    "off": OFF,
    "spread": PRESETS["fast"],
    "fixed": Settings(Fixed((0, 2, 3)), Between(order=2)),
}


@pytest.fixture(autouse=True)
def real_guidance_times(monkeypatch):
    monkeypatch.setattr(magi_sampling, "_float32", list)
    monkeypatch.setattr(magi_forward, "sigmas", lambda steps, order="": MAGI_SIGMAS)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in for a kernel, which makes nothing but its result."""
    return torch.empty_like(q)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=GPU)


def wan_engine(settings: Settings, schedule=SCHEDULE, config=WAN, scale=3.0, attention=attention, **options) -> Engine:
    backbone = (SkyReelsBackbone if config.fps else WanBackbone)(on_gpu(meta(WanNetwork, config)), attention=attention)
    guidance = classifier_free(empty(1, 5, config.text_dim), empty(1, 5, config.text_dim), scale)
    start = lambda chunk: empty(1, config.in_dim, 2, 6, 4)  # noqa: E731
    return build(backbone, schedule, guidance, linear(schedule.steps), start, settings, attention=attention, **options)


def magi(settings: Settings, config=MAGI, chunks=2, visible=VISIBLE_CHUNKS, attention=attention) -> Engine:
    backbone = MagiBackbone(on_gpu(meta(MagiNetwork, config)), attention)
    mask = torch.ones(1, config.caption_tokens, dtype=torch.bool)
    text = MagiText(empty(1, config.caption_tokens, config.caption_width), mask)
    return magi_engine(
        backbone,
        magi_schedule(6 * chunks, 4),
        settings,
        text=lambda chunk: text,
        null=text._replace(captioned=False),
        start=lambda chunk: empty(1, config.channels, 6, 4, 4),
        shape=(1, config.channels, 6, 4, 4),
        device=GPU,
        sampling=MagiSampling(visible=visible),
        attention=attention,
    )


def joint_engine() -> Engine:
    return wan_engine(OFF, ChunkSchedule(3, 6, 2), SKYREELS, solver=UniPC, seeing="joint")


def rolling_engine(chunks: int = 9) -> Engine:
    noise = lambda chunk, step: empty(1, WAN.in_dim, 2, 6, 4)  # noqa: E731
    return wan_engine(OFF, ChunkSchedule(chunks, 4, 1), scale=1.0, noise=noise, solver=Renoise, seeing="rolling")


def meta(network: type, config):
    with torch.device("meta"):
        return network(config)


@dataclass(frozen=True)
class Tick:
    """What a run's tick did on the pretended GPU: see `device_log.Log`."""

    read_backs: int
    sent: int
    made: int


def ticks(log: Log, engine) -> list[Tick]:
    """Runs an engine."""
    seen = []

    def clear() -> None:
        log.read_backs.clear(), log.sent.clear(), log.made.clear()

    def after(progress) -> None:
        seen.append(Tick(len(log.read_backs), len(log.sent), sum(log.made)))
        clear()

    clear()  # of what is sent before the first tick
    engine.on_progress = after
    assert list(engine.run())
    return seen


ENGINES: dict[str, Callable] = {
    "wan": wan_engine,
    "skyreels": lambda settings, **more: wan_engine(settings, config=SKYREELS, **more),
    "skyreels residual": lambda settings: wan_engine(
        replace(settings, reuse=replace(settings.reuse, holds="residual")), config=SKYREELS
    ),
    "wan budget": lambda settings, **more: wan_engine(
        replace(settings, history=HistorySettings(1, relative=True)), ChunkSchedule(4, 4, 4), scale=1.0, **more
    ),
    "wan shared": lambda settings, **more: wan_engine(
        replace(settings, history=HistorySettings(1)), ChunkSchedule(6, 4, 2), **more
    ),
    "wan one by one": lambda settings, **more: wan_engine(
        replace(settings, history=HistorySettings(1)), ChunkSchedule(6, 4, 4), **more
    ),
    "renoise": lambda settings: wan_engine(
        settings, scale=1.0, solver=Renoise, noise=lambda chunk, step: empty(1, WAN.in_dim, 2, 6, 4)
    ),
    "magi": magi,
    "magi distilled": lambda settings, **more: magi(settings, MAGI_DISTILLED, **more),
}
RESIDUAL = "skyreels residual"


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, "flowcache") for name in ENGINES]
    + [(name, "spread") for name in ("wan", "wan budget", "skyreels", "magi")]
    + [("wan", "fixed"), ("wan", "teacache")],
)
def test_the_host_waits_at_most_once_a_tick_and_never_without_a_watching_policy(name, policy, monkeypatch):
    few = {"visible": ()} if "magi" in name else {}  # with fewer, the last chunks are copied for a run that goes on
    with pretended_gpu(monkeypatch) as log:
        run = ticks(log, ENGINES[name]((WATCHING | NOT_WATCHING)[policy], **few))
    most = 1 if policy in WATCHING else 0
    assert max(tick.read_backs for tick in run) == most
    assert sum(tick.sent for tick in run) == 0


def test_magi_waits_only_for_the_copies_of_its_last_chunks(monkeypatch):
    """Those that a run which goes on from there sees, as they become clean."""
    with pretended_gpu(monkeypatch) as log:
        engine = magi(OFF, chunks=7)
        run = ticks(log, engine)
    first = engine.schedule.chunks - (max(VISIBLE_CHUNKS) - 1)
    before = engine.schedule.start(first) + engine.schedule.steps  # its clean pass goes along with this tick
    assert [tick.read_backs for tick in run[:before]] == [0] * before


@pytest.mark.parametrize("engine", [joint_engine, rolling_engine])
def test_a_joint_window_never_waits(engine, monkeypatch):
    with pretended_gpu(monkeypatch) as log:
        run = ticks(log, engine())
    assert [(tick.read_backs, tick.sent) for tick in run] == [(0, 0)] * len(run)


def test_a_wait_would_be_noticed(monkeypatch):
    def cancelled() -> bool:
        return empty(1).sum().item() > 1

    with pretended_gpu(monkeypatch) as log:
        run = ticks(log, wan_engine(OFF, cancelled=cancelled))
    assert min(tick.read_backs for tick in run) > 0


# A chunk's steps allocate what the chunk needs; that must not depend on how much history there is.
@pytest.mark.parametrize(
    "engine",
    [
        lambda: wan_engine(OFF, ChunkSchedule(6, 2, 2), scale=1.0),
        lambda: wan_engine(OFF, ChunkSchedule(6, 2, 2), scale=3.0),
        lambda: wan_engine(replace(OFF, clean_pass=False), ChunkSchedule(7, 4, 2), scale=1.0),
        lambda: wan_engine(replace(OFF, history=HistorySettings(8)), ChunkSchedule(9, 2, 2), scale=3.0),
        lambda: magi(OFF, chunks=9, visible=()),
    ],
)
def test_no_step_copies_the_history(engine, monkeypatch):
    with pretended_gpu(monkeypatch) as log:
        made_engine = engine()
        run = ticks(log, made_engine)
    lag, first = made_engine.schedule.lag, made_engine.schedule.max_active + 1
    middle = [tick.made for tick in run[first * lag : (made_engine.schedule.chunks - 1) * lag]]
    rounds = {tuple(middle[at : at + lag]) for at in range(0, len(middle), lag)}
    assert len(middle) >= 3 * lag and len(rounds) == 1


def watch_histories(monkeypatch) -> list[History]:
    kept: list[History] = []
    make = History.__init__
    monkeypatch.setattr(
        History, "__init__", lambda self, *args, **more: (make(self, *args, **more), kept.append(self))[0]
    )
    return kept


OVER_HISTORY = ["wan", "wan budget", "wan shared", "wan one by one", "skyreels", "magi", "magi distilled"]


@pytest.mark.parametrize("name", OVER_HISTORY)
def test_attention_gets_one_stretch_of_history_and_no_mask(name, monkeypatch):
    """What flash kernels take: three tensors, of which keys and values are pieces of the history as it lies there."""
    kept = watch_histories(monkeypatch)
    over_history = 0

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # a mask, or anything else besides, would be an error here
        nonlocal over_history
        for part, kind in ((k, "keys"), (v, "values")):
            memory = part.untyped_storage()._cdata
            layers = [layer for history in kept for layer in (*history.layers, history.scratch) if layer]
            buffers = (getattr(layer, kind).here for layer in layers)
            if any(buffer.untyped_storage()._cdata == memory for buffer in buffers):
                assert part.stride()[-2:] == (part.shape[-1], 1)
                over_history += 1
        return torch.empty_like(q)

    with pretended_gpu(monkeypatch):
        engine = ENGINES[name](OFF, attention=watched)
        list(engine.run())
        report = engine.report
    alone = 0 if "magi" not in name else engine.schedule.steps * engine.schedule.chunks  # forwards that see no history
    assert over_history >= 2 * (report.forwards_executed - alone) > 0


@pytest.mark.parametrize("name", ["wan", "wan one by one", "skyreels", "wan shared", "wan budget"])
def test_clean_history_is_read_at_most_once_a_layer_and_tick(name, monkeypatch):
    """Not once a chunk; and not at all without a budget, and with one chunk at a time."""
    reads: list[str] = []
    for way in ("read", "copy_to"):
        work = getattr(OffloadableBuffer, way)
        monkeypatch.setattr(
            OffloadableBuffer, way, lambda self, *args, work=work, **more: reads.append("") or work(self, *args, **more)
        )
    cut = History._cut_stored
    monkeypatch.setattr(History, "_cut_stored", lambda self: (cut(self), reads.clear())[0])
    forwards: list[int] = []
    with pretended_gpu(monkeypatch):
        engine = ENGINES[name](OFF)
        ask = engine.forward.network

        def counted(steps, branches, texts):
            reads.clear()
            answer = ask(steps, branches, texts)
            forwards.append(len(reads) / (len(engine.forward.histories) * engine.forward.backbone.layers))
            return answer

        engine.forward.network = counted
        list(engine.run())
    most = {"wan shared": 2, "wan budget": 2}.get(name, 0)  # keys and values
    stored = 2 * (name == "wan budget")
    assert set(forwards) <= {most, most + 1, most + stored} and len(forwards) > 8


@pytest.mark.parametrize("name", OVER_HISTORY)
def test_what_has_moved_is_back_on_the_gpu_for_attention(name, monkeypatch):
    """The pretended GPU refuses to compute with a tensor that is in system memory."""
    kept = watch_histories(monkeypatch)
    with pretended_gpu(monkeypatch):
        engine = ENGINES[name](OFF, attention=fails_at(calls := {3, 12}, attention))
        if room(kept[0]) == 1:  # which can move but once
            calls.remove(12)
        list(engine.run())
        report = engine.report
        saved = [history.save() for history in kept]
    assert all(part.device.type == "cpu" for clean in saved for part in clean) and len(report.notes) == 1
    assert all(history.layers[0].keys.tokens_moved for history in kept)


DEVICES = ["meta"]
DEVICES += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [NOT_WATCHING["spread"], replace(OFF, history=HistorySettings(1)), Settings(Fixed((0, 1)))],
    ids=["spread", "budget", "slots stay"],
)
def test_every_tensor_follows_its_inputs_device_and_type(settings, dtype, device):
    network = WanNetwork(WAN).to(dtype).to(device).requires_grad_(False)
    network.patch_embedding.float()
    like = {"dtype": dtype, "device": device}
    guidance = classifier_free(torch.zeros(1, 5, WAN.text_dim, **like), torch.ones(1, 5, WAN.text_dim, **like), 3.0)
    start = lambda chunk: torch.ones(1, WAN.in_dim, 2, 6, 4, **like)  # noqa: E731
    engine = build(WanBackbone(network), SCHEDULE, guidance, linear(4), start, settings)
    for chunk in engine.run():
        assert (chunk.latent.dtype, chunk.latent.device.type) == (dtype, device)
    for history in engine.forward.histories.values():
        for keys in (history.layers[0].keys.here, *([history.scratch.keys.here] if history.scratch else [])):
            assert (keys.dtype, keys.device.type) == (dtype, device)
