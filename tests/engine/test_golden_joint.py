"""Joint windows of SkyReels-V2 and Rolling Forcing against upstream's own runs (tests/golden/README.md)."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flowcache_core.engine.forward import Step
from flowcache_core.engine.guidance import WeightedGuidance, classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.engine.rolling import SPAN, RollingHistory
from flowcache_core.engine.windows import window_sizes
from flowcache_core.errors import UserError
from flowcache_core.history.positions import rotate
from flowcache_core.models.rotary import Rotary
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone, WanConfig
from flowcache_core.schedule import ChunkSchedule, Given, Place
from flowcache_core.solvers import noise_levels as levels
from flowcache_core.solvers.multistep import SkyReelsUniPC
from flowcache_core.solvers.one_step import Renoise
from tests.helpers import golden_weights
from tests.helpers.golden_runs import StretchedRotary, frames_of, relative_error
from tests.helpers.golden_weights import SMALL, SMALL_FPS
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden
from tests.helpers.runs import build, video

SKYREELS = golden("skyreels")
ROLLING = golden("rolling_forcing")


@dataclass
class Window:
    """One of upstream's windows; its lead and end are frames of the noise tensor that are not generated.

    Attributes:
        condition: noise level that the lead is shown at.
    """

    chunks: int
    frames: int
    lag: int
    config: WanConfig = SMALL
    fps: int = 24
    noise: str = "noise.0"
    lead: torch.Tensor | None = None
    end: torch.Tensor | None = None
    condition: float = 0.0

    @property
    def before(self) -> int:
        return 0 if self.lead is None else self.lead.shape[2]

    def backbone(self, dtype=torch.float32, rotary=Rotary) -> SkyReelsBackbone:
        network = golden_weights.network(self.config).to(dtype)
        network.patch_embedding.float()
        backbone = SkyReelsBackbone(network, self.fps)
        backbone.rotary = rotary(backbone.head_dim)
        return backbone

    def engine(self) -> Engine:
        noise = normal(self.noise, (16, self.before + self.chunks * self.frames, 4, 6))[None, :, self.before :]
        engine = build(
            self.backbone(),
            ChunkSchedule(self.chunks, 8, self.lag),
            classifier_free(*(golden_weights.text(branch, self.config) for branch in ("cond", "uncond")), 3.0),
            levels.skyreels(8),
            noise.split(self.frames, dim=2).__getitem__,
            solver=SkyReelsUniPC,
            seeing="joint",
            grain=grain,
        )
        if self.lead is not None:
            engine.give(Given.LEAD, self.lead, self.condition)
        if self.end is not None:
            engine.give(Given.END, self.end)
        return engine


def image(name: str) -> torch.Tensor:
    return normal(name, (16, 1, 4, 6))[None]


def grain(tick: int) -> torch.Tensor:
    return normal(f"condition.{tick}", (16, 2, 4, 6))[None]


WINDOWS = {
    "sync": Window(6, 1, 0),
    "sync_fps": Window(6, 1, 0, SMALL_FPS, 16),
    "images": Window(4, 1, 0, lead=image("image"), end=image("end_image")),
    "joint": Window(4, 2, 2),
    "joint_fps": Window(4, 2, 2, SMALL_FPS),
    "windows.0": Window(4, 2, 2),
    "windows.1": Window(2, 2, 2, noise="noise.1", lead=SKYREELS["windows.0.final"][:, :, -2:], condition=0.02),
}


def watched(engine: Engine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Frames and their noise levels [T] of every forward of a run, clean passes aside."""
    seen, guidance = [], engine.forward.guidance
    ask = guidance.velocities

    def velocities(steps, network):
        level = [step.sigma for step in steps for _ in range(step.x.shape[2])]
        if not all(step.place.is_clean_pass for step in steps):
            seen.append((torch.cat([step.x for step in steps], dim=2), torch.tensor(level)))
        return ask(steps, network)

    guidance.velocities = velocities
    return seen


@pytest.mark.parametrize("name", WINDOWS)
def test_whole_window(name):
    window = WINDOWS[name]
    engine = window.engine()
    seen = watched(engine)
    found = video(engine)
    for (x, per_frame), latents, told in zip(
        seen, SKYREELS[f"{name}.latents"], SKYREELS[f"{name}.timesteps"], strict=True
    ):
        assert relative_error(x[0], latents) < 1e-4
        assert (1000 * per_frame).floor().tolist() == told.tolist()
    assert relative_error(found, SKYREELS[f"{name}.final"][:, :, window.before :]) < 1e-4


@pytest.mark.parametrize("name", ["sync", "sync_fps", "images", "joint", "joint_fps"])
def test_one_forward(name):
    window = WINDOWS[name]
    at = len(SKYREELS[f"{name}.latents"]) // 2
    x = SKYREELS[f"{name}.latents"][at : at + 1]
    per_frame = (SKYREELS[f"{name}.timesteps"][at].float() + 0.5) / 1000
    for branch in ("cond", "uncond"):
        text, golden = golden_weights.text(branch, window.config), SKYREELS[f"{name}.velocity.{branch}"]

        def error(text=text, golden=golden, dtype=torch.float32, attention=scaled_dot_product_attention, **options):
            """Of one forward over all frames, each a chunk of its own."""
            count, frames = x.shape[2], x.to(dtype).split(1, dim=2)
            guidance = WeightedGuidance({"": text.to(dtype)}, {"": 1.0})
            engine = build(
                window.backbone(dtype, **options), ChunkSchedule(count, 8, 0), guidance, levels.skyreels(8),
                frames.__getitem__, seeing="joint", attention=attention,
            )  # fmt: skip
            steps = [Step(frames[at], per_frame[at].item(), Place(at, 0, 0)) for at in range(count)]
            found = [velocity.value for velocity in engine.forward.velocities(steps)]
            return relative_error(torch.cat(found, dim=2), golden)

        assert error() < 1e-4
        assert error(dtype=torch.bfloat16) < 2e-2
        assert error(rotary=StretchedRotary) > 1e-2
        assert error(attention=causal_attention) > 1e-2


def causal_attention(q, k, v):
    """Wrong on purpose: a joint window looks both ways."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def test_images_work_asynchronously():
    """Upstream's asynchronous mode loses both; here one image and chunks of two frames go together."""
    both = Window(2, 2, 2, lead=image("image"), end=image("end_image"))
    found = video(both.engine())
    assert found.shape == (1, 16, 4, 4, 6)
    for other in (replace(both, lead=image("other")), replace(both, end=image("other"))):
        assert relative_error(video(other.engine()), found) > 1e-2


def test_a_window_takes_no_prefix_chunks():
    with pytest.raises(UserError, match="not as prefix chunks"):
        build(
            Window(2, 2, 2).backbone(), ChunkSchedule(2, 8, 2, prefix=1),
            classifier_free(golden_weights.text("cond")), levels.skyreels(8), lambda chunk: image("image"),
            seeing="joint",
        )  # fmt: skip


def test_window_sizes():
    assert window_sizes(45, 25, 5, 5) == [25, 25]
    assert window_sizes(12, 8, 2, 2) == [8, 6]
    assert window_sizes(20, 25, 5) == [20]
    with pytest.raises(UserError, match="Window 2 generates 1 frames"):
        window_sizes(26, 25, 5, 5)
    with pytest.raises(UserError, match="overlap is 25"):
        window_sizes(45, 25, 25)


def rolling(chunks: int = 11, rotary=Rotary, span: int = SPAN, dtype=torch.float32) -> Engine:
    network = golden_weights.network().to(dtype)
    network.patch_embedding.float()
    backbone = WanBackbone(network)
    backbone.rotary = rotary(backbone.head_dim)
    noise = frames_of("noise", 3 * chunks).to(dtype).split(3, dim=2)
    engine = build(
        backbone,
        ChunkSchedule(chunks, 5, 1),
        classifier_free(golden_weights.text("cond").to(dtype)),
        levels.linear(5, 5.0),
        noise.__getitem__,
        noise=lambda chunk, step: frames_of(f"renoise.{chunk}.{step}", 3).to(dtype),
        solver=Renoise,
        seeing="rolling",
    )
    engine.forward.histories["cond"] = RollingHistory(3, 3, span)
    return engine


def rolled(engine: Engine, x: torch.Tensor, sigmas, first: int) -> torch.Tensor:
    """The velocity of one window [1, C, T, H, W] of chunks, each at its level, from a chunk on."""
    steps = [
        Step(part, sigma, Place(first + at, 0, 0))
        for at, (part, sigma) in enumerate(zip(x.split(3, dim=2), sigmas, strict=True))
    ]
    return torch.cat([velocity.value for velocity in engine.forward.velocities(steps)], dim=2)


def test_rolling_forcing():
    """11 chunks: more than upstream's cache holds, so its oldest chunks are dropped and the sink moves along."""
    engine = rolling()
    seen = watched(engine)
    found = video(engine)
    for number, (x, _) in enumerate(seen):
        assert relative_error(x, ROLLING[f"rolling_forcing.latents.{number}"]) < 1e-4
    assert relative_error(found, ROLLING["rolling_forcing.final"]) < 1e-4


def test_rolling_golden_would_notice():
    golden = ROLLING["rolling_forcing.final"]
    assert relative_error(video(rolling(rotary=StretchedRotary)), golden) > 1e-2
    assert relative_error(video(rolling(span=18)), golden) > 1e-2


@torch.inference_mode()
def test_rolling_forward_in_bfloat16():
    """The window of the golden's stored call, over the clean chunks before it."""
    tick = int(ROLLING["rolling_forcing.velocity.call"]) // 2
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        engine, clean = rolling(dtype=dtype), ROLLING["rolling_forcing.final"].to(dtype).split(3, dim=2)
        first = list(engine.schedule)[tick][0].chunk
        for chunk in range(first):
            engine.forward.finish(chunk, clean[chunk])
        x = ROLLING[f"rolling_forcing.latents.{tick}"].to(dtype)
        found = rolled(engine, x, levels.linear(5, 5.0)[:5][::-1], first)
        assert relative_error(found, ROLLING["rolling_forcing.velocity"]) < limit


@torch.inference_mode()
def test_rolling_memory_is_bounded_and_places_are_relative():
    engine = rolling(chunks=14)
    sizes = [engine.forward.history_bytes[0] for _ in engine.run()]
    assert len(sizes) == 14 and len(set(sizes[6:])) == 1
    assert sizes[-1] == engine.report.history_bytes_planned
    x, sigmas = frames_of("x", 15), torch.linspace(0.2, 1, 5).tolist()
    here = rolled(engine, x, sigmas, 14)
    rotary = engine.forward.backbone.rotary
    angles = torch.zeros(rotary.head_dim // 2, dtype=torch.float64)
    angles[: rotary.parts[0] // 2] = rotary.angles(torch.tensor(3000), rotary.parts[0])
    later = torch.stack([angles.cos(), angles.sin()]).float()  # turns keys on by 3,000 frames
    for kept in engine.forward.histories["cond"].recent:
        kept[:] = [(rotate(keys, later), values) for keys, values in kept]
    assert relative_error(rolled(engine, x, sigmas, 14 + 1000), here) < 1e-4
