"""LongVie 2 against upstream's own pipeline (tests/golden/README.md)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcache_core.engine.forward import Step
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Engine
from flowcache_core.errors import UserError
from flowcache_core.generation import Result, generate
from flowcache_core.models.longvie import Clips, LongVieBackbone, LongVieConfig, LongVieNetwork
from flowcache_core.models.rotary import Rotary
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.settings import HELD, OFF, Drift, Settings, Spread
from flowcache_core.solvers import noise_levels
from tests.helpers import golden_weights
from tests.helpers.golden_runs import StretchedRotary, latents_seen, relative_error
from tests.helpers.magi_weights import normal
from tests.helpers.place import DEVICE, golden
from tests.helpers.runs import build

SMALL = LongVieConfig(dim=128, ffn_dim=128, num_heads=4, num_layers=3, text_dim=24, control_layers=2)
GOLDEN = golden("longvie")
PICTURES, HEIGHT, WIDTH = 17, 32, 48
STEPS = 6


def encode(pictures: Tensor) -> Tensor:
    """The autoencoder of the goldens: 16 of a block's 192 numbers, a mean over four frames; pictures are in [0, 1]."""
    video = (2 * pictures - 1).permute(3, 0, 1, 2)  # [3, T, H, W]
    blocks = video.unflatten(2, (-1, 8)).unflatten(4, (-1, 8))  # [3, T, h, 8, w, 8]
    x = blocks.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)[:16]
    later = [group.mean(dim=1, keepdim=True) for group in x[:, 1:].split(4, dim=1) if group.shape[1] == 4]
    return torch.cat([x[:, :1], *later], dim=1)[None]


def decode(latent: Tensor) -> Tensor:
    """Back to pictures, of which each of four is brighter than the one before."""
    later = latent[0, :, 1:].repeat_interleave(4, dim=1)
    shades = torch.tensor([0.8, 0.9, 1.0, 1.1]).to(latent).repeat(later.shape[1] // 4)
    x = torch.cat([latent[0, :, :1], later * shades[:, None, None]], dim=1)  # [16, T, h, w]
    blocks = torch.cat([x, x.new_zeros(176, *x.shape[1:])]).unflatten(0, (3, 8, 8))
    video = blocks.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    return (video.permute(1, 2, 3, 0) + 1) / 2


def features(picture: Tensor) -> Tensor:
    """The image encoder of the goldens."""
    return normal("features", (1, 257, 1280)) + (2 * picture - 1).permute(2, 0, 1).flatten()[:1280]


def control(name: str) -> Tensor:
    """A control video of three chunks, [frames, H, W, 3] in [0, 1]."""
    chunks = [normal(f"{name}.{chunk}", (3, PICTURES, HEIGHT, WIDTH)) for chunk in range(3)]
    return (torch.cat(chunks, dim=1).permute(1, 2, 3, 0) + 1) / 2


def clips() -> Clips:
    image = (normal("image", (3, HEIGHT, WIDTH)).permute(1, 2, 0) + 1) / 2
    return Clips(encode, decode, features, image, [control("dense"), control("sparse")], chunk_frames=5)


def backbone() -> LongVieBackbone:
    network = LongVieNetwork(SMALL).to(DEVICE)
    golden_weights.fill(network)
    return LongVieBackbone(network.eval().requires_grad_(False))


def text(name: str) -> Tensor:
    return golden_weights.text(name)


def engine(settings: Settings = OFF, chunks: int = 3, rotary=Rotary, scenes=None, steps: int = STEPS) -> Engine:
    runs = backbone()
    runs.rotary = rotary(runs.head_dim)
    texts = [text(f"clip{chunk}") for chunk in range(3)]
    return build(
        runs, ChunkSchedule(chunks, steps, steps), classifier_free(texts.__getitem__, text("uncond"), 3.0),
        noise_levels.linear(steps, 5.0), lambda chunk: normal("noise", (1, 16, 5, 4, 6)), settings,
        seeing="pictures", scenes=scenes or clips(),
    )  # fmt: skip


def test_the_whole_run_is_upstreams():
    """Three chunks: every latent that the network is given, and every finished chunk."""
    run = engine()
    seen = latents_seen(run)
    for number, chunk in enumerate(run.run()):
        assert relative_error(chunk.latent, GOLDEN[f"final.{number}"]) < 1e-5
    for number in range(3):
        of_chunk = torch.cat(seen[STEPS * number : STEPS * (number + 1)])
        assert relative_error(of_chunk, GOLDEN[f"latents.{number}"]) < 1e-5
    assert noise_levels.linear(STEPS, 5.0)[:-1] == pytest.approx((GOLDEN["timesteps"] / 1000).tolist())


def velocities(number: int, change=lambda scene: scene, rotary=Rotary) -> list[Tensor]:
    """Both branches' velocity at the third step of a chunk, as upstream saw it."""
    run = engine(rotary=rotary)
    forward, scenes = run.forward, clips()
    before = GOLDEN[f"final.{number - 1}"] if number else None
    forward.scene = change(scenes(number, before))
    step = Step(GOLDEN[f"latents.{number}"][2:3], GOLDEN["timesteps"][2].item() / 1000, Place(number, 2, 0))
    with torch.inference_mode():
        return [forward.network([step], [name], lambda chunk, shown=shown: [text(shown)])[0]
                for name, shown in (("cond", f"clip{number}"), ("uncond", "uncond"))]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_forward_is_upstreams(number):
    for found, branch in zip(velocities(number), ("cond", "uncond"), strict=True):
        assert relative_error(found, GOLDEN[f"velocity.{number}.{branch}"]) < 1e-5


CHANGES = {
    "without history": lambda scene: scene._replace(history=None),
    "history in another order": lambda scene: scene._replace(history=scene.history.flip(2)),
    "controls exchanged": lambda scene: scene._replace(controls=scene.controls[::-1]),
    "another image": lambda scene: scene._replace(image=scene.image.flip(3)),
    "other features": lambda scene: scene._replace(features=scene.features.flip(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_tells_every_part_of_its_scene(change):
    (found, _) = velocities(1, CHANGES[change])
    assert relative_error(found, GOLDEN["velocity.1.cond"]) > 1e-3


def test_a_forward_tells_positions():
    (found, _) = velocities(1, rotary=StretchedRotary)
    assert relative_error(found, GOLDEN["velocity.1.cond"]) > 1e-3


def psnr(found: Tensor, expected: Tensor) -> float:
    return 10 * torch.log10(expected.abs().max() ** 2 / (found - expected).pow(2).mean()).item()


def whole(run: Engine) -> Tensor:
    return torch.cat([chunk.latent for chunk in run.run()], dim=2)


def test_reused_steps_are_forecast_and_save_forwards():
    """The presets apply as they are: a lag of all the steps is one chunk at a time."""
    plain, reused = engine(steps=24), engine(Settings(Spread(8 / 24)), steps=24)
    expected, found = whole(plain), whole(reused)
    forwards = [run.report.forwards_executed for run in (plain, reused)]
    assert forwards == [3 * 24 * 2, 3 * 8 * 2] and reused.report.fewer == 3.0
    more = whole(engine(Settings(Spread(16 / 24)), steps=24))
    assert psnr(more, expected) > psnr(found, expected) + 3 > 33


def test_a_policy_that_watches_sees_the_chunks_own_tokens():
    run = engine(Settings(Drift(0.2, warmup=2), HELD), steps=24)
    whole(run)
    assert 3 * 2 * 2 < run.report.forwards_executed < 3 * 24 * 2


def generated(chunks: int, first: int = 0, **more) -> Result:
    """Chunks by `generate`, the first of which shows its caption."""
    return generate(
        backbone(), [text(f"clip{chunk}") for chunk in range(first, 3)], chunks, family_name="longvie", steps=STEPS,
        negative=text("uncond"), guidance_scale=3.0, frames_per_chunk=5, latent_size=(4, 6), settings=OFF,
        noise=lambda chunk, step: normal("noise", (1, 16, 5, 4, 6)), scenes=clips(), **more,
    )  # fmt: skip


def test_generate_gives_upstreams_video_in_one_run_or_in_two():
    expected = torch.cat([GOLDEN[f"final.{number}"] for number in range(3)], dim=2)
    video = generated(3).latents
    assert relative_error(video, expected.cpu()) < 1e-5
    assert torch.equal(generated(2, 1, state=generated(1).state).latents, video)


def test_one_noise_of_the_seed_serves_every_chunk():
    seen = []
    run = engine()
    ask = run.sampling.start
    run.sampling = replace(run.sampling, start=lambda chunk: seen.append(ask(chunk)) or seen[-1])
    whole(run)
    assert torch.equal(seen[1][:, :, 1:], seen[0][:, :, 1:]) and not torch.equal(seen[1][:, :, :1], seen[0][:, :, :1])


WRONG = {
    "no pictures": ({"scenes": None}, "give scenes"),
    "a lag": ({"lag": 2}, "set the lag to the steps"),
    "frames that fill no chunk": ({"prefix": torch.zeros(1, 16, 3, 4, 6)}, "fill no chunk"),
    "an end": ({"end": torch.zeros(1, 16, 1, 4, 6)}, "takes no end"),
    "videos that are too short": ({"chunks": 4}, "control video has 51 frames"),
    "another size": ({"latent_size": (4, 8)}, "video's size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_run_is_said(name):
    change, words = WRONG[name]
    asked = {
        "text": text("clip0"), "chunks": 1, "family_name": "longvie", "steps": STEPS, "negative": text("uncond"),
        "frames_per_chunk": 5, "latent_size": (4, 6), "settings": OFF, "scenes": clips(),
    }  # fmt: skip
    with pytest.raises(UserError, match=words):
        generate(backbone(), **asked | change)
