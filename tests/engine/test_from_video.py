"""Video to video: chunks that start from a given video under noise."""

import pytest
import torch

from flowcache_core import generate
from flowcache_core.engine.forward import Step
from flowcache_core.engine.from_video import from_video
from flowcache_core.errors import UserError
from flowcache_core.models.families import SOLVERS
from flowcache_core.models.magi.sampling import sigmas
from flowcache_core.models.presets import measured_steps, preset
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.settings import OFF, Fixed, HistorySettings, Settings
from flowcache_core.solvers.noise_levels import linear, remaining
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.magi_runs import FRAMES, RUNS, magi_run
from tests.helpers.tiny import TINY

CHUNK = (1, 4, 2, 6, 4)
SHORT = {"steps": 8, "lag": 8, "frames_per_chunk": 2, "latent_size": (6, 4), "settings": OFF, "seed": 3}
TEXT = torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(0))
# Every way in which chunks see each other, and every solver.
WAYS = {
    "one by one": {},
    "overlapping": {"lag": 2},
    "all at once": {"lag": 0},
    "joint": {"lag": 3, "seeing": "joint"},
    "rolling": {"lag": 1, "seeing": "rolling"},
    "a longer first chunk": {"steps": 2, "lag": 2, "family_name": "causal"},
    **{name: {"lag": 3, "solver": solver} for name, solver in SOLVERS.items()},
}


def some_video(frames: int = 6) -> torch.Tensor:
    return torch.randn(1, 4, frames, 6, 4, generator=torch.Generator().manual_seed(1))


def far(ours: torch.Tensor, others: torch.Tensor) -> float:
    return ((ours - others).norm() / others.norm()).item()


@pytest.mark.parametrize("way", WAYS)
def test_strength_1_is_the_run_without_the_video(backbone, way):
    told = SHORT | WAYS[way]
    plain = generate(backbone, TEXT, 3, **told)
    whole = generate(backbone, TEXT, 3, **told, video=some_video(), strength=1.0)
    assert torch.equal(whole.latents, plain.latents) and whole.report.as_dict()["notes"] == []


@pytest.mark.parametrize("way", WAYS)
def test_strength_just_above_0_gives_the_video_back(backbone, way):
    told, video = SHORT | WAYS[way], some_video()
    found = [far(generate(backbone, TEXT, 3, **told, video=video, strength=s).latents, video) for s in (1e-4, 0.3, 0.9)]
    assert found[0] < 0.02 and min(found[1:]) > 0.1, found


@pytest.mark.parametrize(("strength", "steps"), [(0.9, 8), (0.75, 6), (0.5, 4), (0.51, 5), (0.125, 1), (0.01, 1)])
@pytest.mark.parametrize("lag", [8, 2])
def test_the_steps_that_are_left_are_taken(backbone, strength, steps, lag):
    told = SHORT | {"lag": lag}
    report = generate(backbone, TEXT, 3, **told, video=some_video(), strength=strength).report
    assert report.forwards_executed == report.forwards_total == 3 * (steps + 1)
    assert (report.schedule.steps, report.schedule.lag) == (steps, min(lag, steps))
    assert f"takes {steps} step" in report.notes[0] and f"strength {strength:g}" in report.notes[0]


def test_a_chunk_is_what_the_last_levels_make_of_its_own_frames_under_noise(backbone):
    """By hand: the levels of another run, whose noise is the mixture."""
    video, levels = some_video(), linear(8, 5.0)
    ours = generate(backbone, TEXT, 3, **SHORT, sigmas=levels, video=video, strength=0.5)

    def mixture(chunk, step):
        unit = chunk_noise(3, chunk, CHUNK)
        return (1 - levels[4]) * video[:, :, 2 * chunk : 2 * chunk + 2] + levels[4] * unit

    told = SHORT | {"steps": 4, "lag": 4}
    by_hand = generate(backbone, TEXT, 3, **told, sigmas=levels[4:], noise=mixture)
    assert far(ours.latents, by_hand.latents) < 1e-6


def test_levels_between_two_of_the_schedule():
    assert remaining([1.0, 0.8, 0.5, 0.0], 1.0) == [1.0, 0.8, 0.5, 0.0]
    assert remaining([1.0, 0.8, 0.5, 0.0], 2 / 3) == [0.8, 0.5, 0.0]
    assert remaining([1.0, 0.8, 0.5, 0.0], 0.5) == pytest.approx([0.65, 0.5, 0.0])
    assert remaining([1.0, 0.8, 0.5, 0.0], 1e-9) == [0.5, 0.0]  # a chunk takes one step at least
    for steps in range(1, 65):
        for left in range(1, steps + 1):
            assert remaining(linear(steps), left / steps) == linear(steps)[steps - left :]


def test_frames_count_from_the_beginning_of_the_whole_video(backbone):
    """Two parts, the second from the first one's state or latents, see the same frames as one run."""
    told, video = SHORT | {"strength": 0.5}, some_video(8)
    whole = generate(backbone, TEXT, 4, **told, video=video)
    first = generate(backbone, TEXT, 2, **told, video=video)
    rest = generate(backbone, TEXT, 2, **told, video=video, state=first.state)
    assert far(rest.latents, whole.latents) < 1e-5
    given = generate(backbone, TEXT, 2, **told, video=video, prefix=first.latents)
    assert far(given.latents, whole.latents) < 1e-5
    lead = generate(backbone, TEXT, 2, **SHORT, video=video, strength=1e-4, prefix=video[:, :, :3])
    assert far(lead.latents, video[:, :, :7]) < 0.01


def test_another_video_makes_another_one(backbone):
    told = SHORT | {"strength": 0.5}
    one = generate(backbone, TEXT, 3, **told, video=some_video()).latents
    assert far(generate(backbone, TEXT, 3, **told, video=-some_video()).latents, one) > 0.1


@pytest.mark.parametrize("name", ["off", "high", "balanced", "fast"])
def test_presets_reuse_the_steps_that_are_left(backbone, name):
    told = SHORT | {"steps": 64, "lag": 16, "settings": preset(name, budget=2), "video": some_video()}
    report = generate(backbone, TEXT, 3, **told, strength=0.5).report
    assert report.schedule.steps == 32 and report.schedule.lag == 16
    assert (report.reused > 0) == (name != "off")


def test_listed_steps_stay_at_their_noise_levels():
    whole = ChunkSchedule(3, 64, 16)
    source = from_video(some_video(), 0.5, CHUNK, 0, whole)
    left = source.schedule(whole)
    assert left.skipped == 32
    for reuse in (Fixed((0, 10, 32, 40, 63)), measured_steps((0, 10, 32, 40, 63), 64, 16)):
        assert reuse.policy(left).recomputed(32) == {0, 8, 31}
        assert reuse.policy(whole).recomputed(64) == {0, 10, 32, 40, 63}
    alone = ChunkSchedule(3, 64, 64)
    assert measured_steps((0, 40), 64, 64).policy(source.schedule(alone)).recomputed(32) == {0, 8}
    other = measured_steps((0, 40), 64, 16).policy(ChunkSchedule(3, 32, 16))  # a schedule that it was not made for
    assert other.recomputed(32) != {0, 8}


def test_reuse_holds_while_a_chunk_goes_on(backbone):
    """What is listed decides how many forwards there are, and reusing none gives the plain bits."""
    told = SHORT | {"lag": 2, "video": some_video(), "strength": 0.5}
    plain = generate(backbone, TEXT, 3, **told)
    all_listed = generate(backbone, TEXT, 3, **told | {"settings": Settings(Fixed(range(8)))})
    assert torch.equal(all_listed.latents, plain.latents)
    some = generate(backbone, TEXT, 3, **told | {"settings": Settings(Fixed((0, 6)))})  # the first one, and 6 - 4
    assert some.report.forwards_executed == 3 * (2 + 1)


def test_a_batch_and_a_budget(backbone):
    both, video = TEXT.expand(2, -1, -1), torch.cat([some_video(), -some_video()])
    told = SHORT | {"settings": Settings(history=HistorySettings(1)), "strength": 1e-4}
    assert far(generate(backbone, both, 3, **told, video=video).latents, video) < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.0}, "strength is 0, expected above 0 to 1: near 0 the video stays as it is"),
        ({"strength": 1.5}, "strength is 1.5, expected above 0 to 1"),
        ({"video": some_video(5)}, "has 5 latent frames, and 3 chunks of 2 take 6: it is enough for 2 chunks; ask"),
        ({"video": some_video(5), "strength": 1.0}, "it is enough for 2 chunks"),
        ({"video": some_video(), "prefix": some_video(3)}, "behind the 3 that are there take 9: .* for 1 chunk;"),
        ({"video": some_video()[..., :2], "prefix": some_video(2)}, r"expected \[1, 4, frames, 6, 4\]; bring"),
        ({"video": some_video()[:, :3]}, r"expected \[1, 4, frames, 6, 4\]"),
        ({"video": some_video() / 0}, "to start from holds NaN or infinite values"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(backbone, change, words):
    with pytest.raises(UserError, match=words):
        generate(backbone, TEXT, 3, **SHORT | change)


def test_a_run_from_pictures_takes_no_video(backbone):
    told = SHORT | {"family_name": "longvie", "guidance_scale": 1.0, "scenes": lambda *told: None}
    with pytest.raises(UserError, match="starts from noise; leave 'video' out"):
        generate(backbone, TEXT, 3, **told, video=some_video())


def test_the_size_is_the_videos(backbone):
    wide = torch.randn(1, 4, 6, 4, 8)
    assert generate(backbone, TEXT, 3, **SHORT | {"settings": OFF}, video=wide).latents.shape == wide.shape


@pytest.mark.parametrize("name", RUNS)
def test_magi(name):
    """The video comes back nearly, and its stages lie where they lie in the whole schedule."""
    plain = magi_run(name)
    schedule, shape = plain.schedule, tuple(plain.begin(plain.schedule.prefix).latent.shape)
    frames = schedule.total_chunks * FRAMES
    video = torch.randn(*shape[:2], frames, *shape[3:], generator=torch.Generator().manual_seed(2))

    def run(strength):
        source = from_video(video, strength, shape, FRAMES * schedule.prefix, schedule)
        left = source.schedule(schedule)
        made = magi_run(name, schedule=left, source=source)
        return made, torch.cat([chunk.latent for chunk in made.run()], dim=2)

    little, nearly = run(1e-3)
    given = little.sampling.pinned(schedule.prefix, torch.full(shape, torch.nan)).isnan()
    own = video[:, :, FRAMES * schedule.prefix :]
    free = torch.cat([given, torch.ones_like(own[:, :, FRAMES:], dtype=torch.bool)], dim=2)
    assert little.schedule.steps == 1 and far(nearly[free], own[free]) < 0.02
    half, latents = run(0.5)
    steps = schedule.steps // 2
    assert half.schedule.steps == steps and half.schedule.whole_steps == schedule.steps
    assert half.sampling.sigmas == sigmas(schedule.steps, half.forward.sampling.order)[steps:]
    for step in range(steps):
        left, whole = Place(schedule.prefix, step, 0), Place(schedule.prefix, steps + step, 0)
        assert half.forward._visible(left) == plain.forward._visible(whole)
        mixes = [
            made.forward.mix(Step(video, 0.5, place), oldest=True) for made, place in ((half, left), (plain, whole))
        ]
        assert mixes[0] == mixes[1]
    assert torch.isfinite(latents).all()
