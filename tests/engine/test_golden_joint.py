"""Joint windows of SkyReels-V2 and Rolling Forcing against upstream's own runs (tests/golden/README.md)."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.engine.joint import Given, JointEngine, JointGuidance
from flowcache_core.engine.rolling import RollingDenoise, RollingEngine, RollingHistory
from flowcache_core.engine.windows import window_sizes
from flowcache_core.errors import UserError
from flowcache_core.models.rotary import Rotary, rotate
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone, WanConfig
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.solvers import noise_levels as levels
from flowcache_core.solvers.multistep import SkyReelsUniPC
from flowcache_core.solvers.one_step import Renoise
from tests.helpers import golden_weights
from tests.helpers.golden_runs import StretchedRotary, frames_of, relative_error
from tests.helpers.golden_weights import SMALL, SMALL_FPS
from tests.helpers.magi_weights import normal
from tests.helpers.paths import GOLDEN_FOLDER

SKYREELS = load_file(GOLDEN_FOLDER / "skyreels.safetensors")
ROLLING = load_file(GOLDEN_FOLDER / "rolling_forcing.safetensors")


@dataclass
class Window:
    """One of upstream's windows; `given` are frames of the noise tensor that are not generated."""

    chunks: int
    frames: int
    lag: int
    config: WanConfig = SMALL
    fps: int = 24
    noise: str = "noise.0"
    given: Given = Given()

    @property
    def before(self) -> int:
        return 0 if self.given.start is None else self.given.start.shape[2]

    def backbone(self, dtype=torch.float32, rotary=Rotary) -> SkyReelsBackbone:
        network = golden_weights.network(self.config).to(dtype)
        network.patch_embedding.float()
        backbone = SkyReelsBackbone(network, self.fps)
        backbone.rotary = rotary(backbone.head_dim)
        return backbone

    def engine(self) -> JointEngine:
        noise = normal(self.noise, (16, self.before + self.chunks * self.frames, 4, 6))[None, :, self.before :]
        texts = {branch: golden_weights.text(branch, self.config) for branch in ("cond", "uncond")}
        return JointEngine(
            ChunkSchedule(self.chunks, 8, self.lag),
            JointGuidance(self.backbone(), texts, {"cond": 3.0, "uncond": -2.0}),
            levels.skyreels(8),
            start=noise.split(self.frames, dim=2).__getitem__,
            solver=SkyReelsUniPC,
            given=self.given,
        )


def image(name: str) -> torch.Tensor:
    return normal(name, (16, 1, 4, 6))[None]


def grain(tick: int) -> torch.Tensor:
    return normal(f"condition.{tick}", (16, 2, 4, 6))[None]


WINDOWS = {
    "sync": Window(6, 1, 0),
    "sync_fps": Window(6, 1, 0, SMALL_FPS, 16),
    "images": Window(4, 1, 0, given=Given(image("image"), image("end_image"))),
    "joint": Window(4, 2, 2),
    "joint_fps": Window(4, 2, 2, SMALL_FPS),
    "windows.0": Window(4, 2, 2),
    "windows.1": Window(
        2, 2, 2, noise="noise.1", given=Given(SKYREELS["windows.0.final"][:, :, -2:], condition=0.02, grain=grain)
    ),
}


def video(engine: JointEngine) -> torch.Tensor:
    return torch.cat([chunk.latent for chunk in engine.run()], dim=2)


@pytest.mark.parametrize("name", WINDOWS)
def test_whole_window(name):
    window = WINDOWS[name]
    engine = window.engine()
    seen, denoise = [], engine.denoise
    engine.denoise = lambda x, per_frame, first: seen.append((x, per_frame)) or denoise(x, per_frame, first)
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

        def error(text=text, golden=golden, attention=None, dtype=torch.float32, **options):
            guidance = JointGuidance(window.backbone(dtype, **options), {"": text.to(dtype)}, {"": 1.0})
            guidance.attention = attention or guidance.attention
            return relative_error(guidance(x.to(dtype), per_frame, 0), golden)

        assert error() < 1e-4
        assert error(dtype=torch.bfloat16) < 2e-2
        assert error(rotary=StretchedRotary) > 1e-2
        assert error(attention=causal_attention) > 1e-2


def causal_attention(q, k, v):
    """Wrong on purpose: a joint window looks both ways."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_images_work_asynchronously():
    """Upstream's asynchronous mode loses both; here one image and chunks of two frames go together."""
    both = Window(2, 2, 2, given=Given(image("image"), image("end_image")))
    found = video(both.engine())
    assert found.shape == (1, 16, 4, 4, 6)
    for given in (Given(image("other"), image("end_image")), Given(image("image"), image("other"))):
        assert relative_error(video(Window(2, 2, 2, given=given).engine()), found) > 1e-2


def test_condition_noise_needs_start_frames():
    with pytest.raises(UserError, match="no start frames"):
        Given(condition=0.02)
    with pytest.raises(UserError, match="not as prefix chunks"):
        JointEngine(ChunkSchedule(2, 8, 2, prefix=1), None, levels.skyreels(8), None)


def test_window_sizes():
    assert window_sizes(45, 25, 5, 5) == [25, 25]
    assert window_sizes(12, 8, 2, 2) == [8, 6]
    assert window_sizes(20, 25, 5) == [20]
    with pytest.raises(UserError, match="Window 2 generates 1 frames"):
        window_sizes(26, 25, 5, 5)
    with pytest.raises(UserError, match="overlap is 25"):
        window_sizes(45, 25, 25)


def rolling(chunks: int = 11, rotary=Rotary, span: int = 21, dtype=torch.float32) -> RollingEngine:
    network = golden_weights.network().to(dtype)
    network.patch_embedding.float()
    backbone = WanBackbone(network)
    backbone.rotary = rotary(backbone.head_dim)
    noise = frames_of("noise", 3 * chunks).to(dtype).split(3, dim=2)
    return RollingEngine(
        ChunkSchedule(chunks, 5, 1),
        RollingDenoise(backbone, golden_weights.text("cond").to(dtype), RollingHistory(3, span)),
        levels.warped(levels.ROLLING_FORCING),
        start=noise.__getitem__,
        noise=lambda chunk, step: frames_of(f"renoise.{chunk}.{step}", 3).to(dtype),
        solver=Renoise,
    )


def test_rolling_forcing():
    """11 chunks: more than upstream's cache holds, so its oldest chunks are dropped and the sink moves along."""
    engine = rolling()
    seen = []

    class Seen(RollingDenoise):
        def __call__(self, x, per_frame, first):
            seen.append(x)
            return super().__call__(x, per_frame, first)

    engine.denoise = Seen(engine.denoise.backbone, golden_weights.text("cond"), engine.denoise.history)
    found = video(engine)
    for number, x in enumerate(seen):
        assert relative_error(x, ROLLING[f"rolling_forcing.latents.{number}"]) < 1e-4
    assert relative_error(found, ROLLING["rolling_forcing.final"]) < 1e-4


def test_rolling_golden_would_notice():
    golden = ROLLING["rolling_forcing.final"]
    assert relative_error(video(rolling(rotary=StretchedRotary)), golden) > 1e-2
    assert relative_error(video(rolling(span=18)), golden) > 1e-2


def test_rolling_forward_in_bfloat16():
    """The window of the golden's stored call, over the clean chunks before it."""
    tick = int(ROLLING["rolling_forcing.velocity.call"]) // 2
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        engine = rolling(dtype=dtype)
        denoise, clean = engine.denoise, ROLLING["rolling_forcing.final"].to(dtype).split(3, dim=2)
        chunks = [place.chunk for place in list(engine.schedule)[tick]]
        for chunk in range(chunks[0]):
            denoise.clean(clean[chunk], 3 * chunk)
        per_frame = torch.tensor(levels.warped(levels.ROLLING_FORCING)[:5][::-1]).repeat_interleave(3)
        x = ROLLING[f"rolling_forcing.latents.{tick}"].to(dtype)
        found = denoise(x, per_frame, 3 * chunks[0])
        assert relative_error(found, ROLLING["rolling_forcing.velocity"]) < limit


def test_rolling_memory_is_bounded_and_places_are_relative():
    engine = rolling(chunks=14)
    sizes = [engine.denoise.history.bytes for _ in engine.run()]
    assert len(sizes) == 14 and len(set(sizes[6:])) == 1
    x, per_frame = frames_of("x", 15), torch.linspace(0.2, 1, 15)
    here = engine.denoise(x, per_frame, 42)
    rotary = engine.denoise.backbone.rotary
    angles = torch.zeros(rotary.head_dim // 2, dtype=torch.float64)
    angles[: rotary.parts[0] // 2] = rotary.angles(torch.tensor(3000), rotary.parts[0])
    later = torch.stack([angles.cos(), angles.sin()]).float()  # turns keys on by 3,000 frames
    for kept in engine.denoise.history.recent.values():
        kept[:] = [(rotate(keys, later), values) for keys, values in kept]
    assert relative_error(engine.denoise(x, per_frame, 42 + 3000), here) < 1e-4
