"""SkyReels-V2, chunk by chunk as FlowCache runs it, against FlowCache's own runs (tests/golden/README.md)."""

import pytest
import torch

from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.models.families import family
from flowcache_core.models.rotary import Rotary
from flowcache_core.models.skyreels import POLYNOMIAL_1_3B, POLYNOMIAL_14B, SkyReelsBackbone
from flowcache_core.models.wan import WanConfig
from flowcache_core.reuse.policies import relative_change
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HELD, Drift, Off, Reuse, Settings
from flowcache_core.solvers.multistep import SkyReelsUniPC, UniPC
from flowcache_core.solvers.noise_levels import skyreels
from tests.helpers import golden_weights
from tests.helpers.golden_runs import StretchedRotary, latents_seen, relative_error
from tests.helpers.golden_weights import SMALL, SMALL_FPS
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden
from tests.helpers.runs import build, give, video

GOLDEN = golden("skyreels_flowcache")
CONDITION = 0.02  # noise level of a window's given frames
POLYNOMIALS = {"1.3B": POLYNOMIAL_1_3B, "14B": POLYNOMIAL_14B}
THRESHOLDS = {"slow": 0.1, "fast": 0.15}


def window(
    number: int,
    config: WanConfig,
    chunks: int,
    frames: int,
    steps: int,
    lag: int,
    given: torch.Tensor | None = None,
    reuse: Reuse = Off(),
    rotary=Rotary,
    solver=SkyReelsUniPC,
) -> Engine:
    """A window of a long run; the second begins with a `given` chunk [1, C, frames, H, W]."""
    backbone = SkyReelsBackbone(golden_weights.network(config), fps=24)
    backbone.rotary = rotary(backbone.head_dim)
    prefix = 0 if given is None else 1
    schedule = ChunkSchedule(chunks - prefix, steps, lag, prefix)
    noise = normal(f"noise.{number}", (16, chunks * frames, 4, 6))[None].split(frames, dim=2)
    guidance = classifier_free(*(golden_weights.text(branch, config) for branch in ("cond", "uncond")), 3.0)
    settings = Settings(reuse, HELD, clean_pass=False)
    engine = build(backbone, schedule, guidance, skyreels(steps), noise.__getitem__, settings, solver=solver)
    if given is not None:
        grain = normal("condition.0", tuple(given.shape[1:]))[None]
        give(engine, torch.lerp(given, grain, CONDITION), frames, CONDITION)
    return engine


@pytest.mark.parametrize(("name", "config"), [("off", SMALL), ("off_fps", SMALL_FPS)])
def test_whole_run(name, config):
    engine = window(0, config, chunks=4, frames=2, steps=8, lag=2)
    seen = latents_seen(engine)
    first = video(engine)
    places = [place for tick in engine.schedule for place in tick]
    for place, x in zip(places, seen, strict=True):
        golden = GOLDEN[f"{name}.0.latents"][place.tick].split(2, dim=1)[place.chunk]
        assert relative_error(x[0], golden) < 1e-4
    assert relative_error(first, GOLDEN[f"{name}.0.final"]) < 1e-4
    second = window(1, config, 4, 2, 8, 2, given=first[:, :, -2:])
    assert relative_error(video(second), GOLDEN[f"{name}.1.final"][:, :, 2:]) < 1e-4


def test_the_golden_would_notice():
    golden = GOLDEN["off.0.final"]
    assert relative_error(video(window(0, SMALL, 4, 2, 8, 2, rotary=StretchedRotary)), golden) > 1e-2
    assert relative_error(video(window(0, SMALL, 4, 2, 8, 3)), golden) > 1e-3  # another mask: chunks see other chunks
    assert relative_error(video(window(0, SMALL, 4, 2, 8, 2, solver=UniPC)), golden) > 1e-3
    with_fps = window(0, SMALL_FPS, 4, 2, 8, 2)
    with_fps.forward.backbone.fps = 16
    assert relative_error(video(with_fps), GOLDEN["off_fps.0.final"]) > 1e-3


def published(preset: str, size: str) -> Drift:
    return Drift(THRESHOLDS[preset], warmup=5, last=True, rescale=POLYNOMIALS[size], holds="residual")


@pytest.mark.parametrize(("size", "dim"), [("1.3B", 1536), ("14B", 5120)])
@pytest.mark.parametrize("preset", THRESHOLDS)
def test_the_familys_presets_are_the_published_ones(preset, size, dim):
    theirs = Settings(published(preset, size), HELD, clean_pass=False)
    assert family("skyreels").published(f"paper {preset}", dim) == theirs


@pytest.mark.parametrize("size", POLYNOMIALS)
@pytest.mark.parametrize("preset", THRESHOLDS)
def test_published_presets(preset, size):
    """50 steps, lag 5, 5 chunks of 5 frames, two windows: the same decisions, and the same latents after them."""
    reuse, given = published(preset, size), None
    for number in range(2):
        engine = window(number, SMALL, 5, 5, 50, 5, given, reuse)
        found = video(engine)
        golden = GOLDEN[f"{preset}_{size}.{number}.recomputed"].bool()
        assert 0.3 < golden[1].float().mean() < 0.9  # some steps are reused, not all
        for decisions in engine.report.decisions.values():
            assert {chunk: golden[chunk].tolist() for chunk in engine.schedule.indices} == decisions
        assert relative_error(found, GOLDEN[f"{preset}_{size}.{number}.final"][:, :, 5 * number :]) < 1e-4
        given = found[:, :, -5:]


def test_signal_is_the_modulation():
    """It tells noise levels apart only where their whole time-steps differ, and nothing of the latent."""
    backbone = SkyReelsBackbone(golden_weights.network(SMALL_FPS))
    x = normal("x", (1, 16, 2, 4, 6))

    def signal(sigma, x=x):
        return backbone.reuse_signal(x, torch.tensor([sigma]))

    assert torch.equal(signal(0.9991), signal(0.9999, 2 * x))
    change = relative_change([signal(0.5)], [signal(0.51)])[0]
    assert 1e-3 < change < 0.1
