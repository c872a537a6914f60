"""Self-Forcing, Causal-Forcing and CausVid against upstream's own runs, and positions that count from the window's
start against flashdreams' (tests/golden/README.md)."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from flowcache_core.engine.forward import Step
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.models.rotary import Rotary
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.settings import Compression, HistorySettings, Settings
from flowcache_core.solvers import noise_levels as levels
from flowcache_core.solvers.one_step import Renoise
from tests.helpers import golden_weights
from tests.helpers.golden_runs import StretchedRotary, frames_of, latents_seen, relative_error
from tests.helpers.place import golden
from tests.helpers.runs import build, give

GOLDEN = golden("causal") | golden("flashdreams")
SELF_FORCING = levels.linear(4, 5.0)


def looked_up(sigmas, noise):
    """CausVid's solver."""
    return Renoise(levels.nearest_trained(sigmas), noise)


@dataclass
class Run:
    """One of upstream's runs.

    Attributes:
        chunks, frames: generated chunks, and latent frames of each.
        first: levels of the first chunk where it has more steps.
        image: whether a given frame comes before.
    """

    chunks: int
    frames: int
    sigmas: list[float] = field(default_factory=lambda: SELF_FORCING)
    first: list[float] | None = None
    image: bool = False
    history: HistorySettings = HistorySettings()
    solver: object = Renoise


WINDOW = partial(Compression, rule="window")
RUNS = {
    "self_forcing": Run(3, 3),
    "self_forcing_window": Run(6, 3, history=HistorySettings(2, WINDOW())),  # local_attn_size 9: itself and 2 chunks
    "self_forcing_sink": Run(6, 3, history=HistorySettings(2, WINDOW(protect_first=True))),
    "flashdreams_sink": Run(7, 3, history=HistorySettings(3, WINDOW(protect_first=True), relative=True)),
    "flashdreams_sink_framewise": Run(9, 1, history=HistorySettings(3, WINDOW(protect_first=True), relative=True)),
    "causal_forcing": Run(5, 1),
    "causal_forcing_image": Run(4, 1, image=True),
    "causal_forcing_2_steps": Run(4, 1, levels.linear(2, 5.0), SELF_FORCING),
    "causal_forcing_1_step": Run(4, 1, levels.linear(1, 5.0), SELF_FORCING),
    "causvid_3_steps": Run(3, 3, levels.CAUSVID_3_STEPS, solver=looked_up),
    "causvid_4_steps": Run(3, 3, levels.linear(4, 8.0)),
}


def make(run: Run, dtype=torch.float32, rotary=Rotary, history=None) -> Engine:
    network = golden_weights.network().to(dtype)
    network.patch_embedding.float()
    backbone = WanBackbone(network)
    backbone.rotary = rotary(backbone.head_dim)
    steps, prefix = len(run.sigmas) - 1, int(run.image)
    schedule = ChunkSchedule(run.chunks, steps, steps, prefix, None if run.first is None else len(run.first) - 1)
    noise = frames_of("noise", run.chunks * run.frames).split(run.frames, dim=2)
    engine = build(
        backbone,
        schedule,
        classifier_free(golden_weights.text("cond").to(dtype)),
        run.sigmas,
        start=lambda chunk: noise[chunk - prefix].to(dtype),
        settings=Settings(history=history or run.history),
        noise=lambda chunk, step: frames_of(f"renoise.{chunk}.{step}", run.frames).to(dtype),
        solver=run.solver,
        first_sigmas=run.first,
    )
    if run.image:
        give(engine, frames_of("image", 1).to(dtype), run.frames)
    return engine


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    run = RUNS[name]
    engine = make(run)
    seen = latents_seen(engine)
    found = torch.cat([chunk.latent for chunk in engine.run()], dim=2)
    engine.save()  # the last chunk's clean pass
    golden = GOLDEN[f"{name}.latents"][int(run.image) :]
    for x, expected in zip(seen, golden, strict=True):
        assert relative_error(x[0], expected) < 1e-4
    assert relative_error(found, GOLDEN[f"{name}.final"][:, :, int(run.image) :]) < 1e-4


@torch.inference_mode()
def one_forward(name: str, **wrong) -> torch.Tensor:
    """The velocity of the golden's stored call, after the clean passes of the chunks before it."""
    run = RUNS[name]
    call, offset = int(GOLDEN[f"{name}.velocity.call"]), int(run.image)
    times, inputs = GOLDEN[f"{name}.timesteps"][: call + 1], GOLDEN[f"{name}.latents"]
    engine = make(run, **wrong)
    forward, dtype = engine.forward, engine.forward.dtype
    clean = [at for at in range(offset, call) if times[at] == 0]
    for chunk, at in enumerate(clean, start=offset):
        latent = inputs[at][None].to(dtype)
        forward.velocities([Step(latent, 1.0, Place(chunk, 0, 0))])  # it has its place in the history
        forward.finish(chunk, latent)
    step = Step(inputs[call][None].to(dtype), times[call].item() / 1000, Place(len(clean) + offset, 0, 0))
    return forward.velocities([step])[0].value


@pytest.mark.parametrize("name", RUNS)
def test_one_forward(name):
    golden = GOLDEN[f"{name}.velocity"]
    assert relative_error(one_forward(name), golden) < 1e-4
    assert relative_error(one_forward(name, rotary=StretchedRotary), golden) > 1e-2  # a wrong position shows
    assert relative_error(one_forward(name, history=HistorySettings(1, WINDOW())), golden) > 1e-2  # a wrong mask too


@pytest.mark.parametrize("name", RUNS)
def test_bfloat16_is_near_the_float32_golden(name):
    assert relative_error(one_forward(name, dtype=torch.bfloat16), GOLDEN[f"{name}.velocity"]) < 2e-2
