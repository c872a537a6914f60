"""Teacher-forced runs: each chunk over the plain run's keys and values."""

import pytest
import torch

from flowcache_core.demo import load_network
from flowcache_core.lab.likeness import decibels, pixels
from flowcache_core.lab.methods import THRESHOLDS, ours, peers
from flowcache_core.lab.runs import Clips, Method, run
from flowcache_core.lab.setups import SETUPS, Setup
from flowcache_core.lab.teacher import Teacher, can_be_taught, taught
from flowcache_core.settings import Every, Settings
from flowcache_core.solvers.multistep import UniPC
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import Euler

QUICK = Setup("magi", 8, 4, magi, Euler)
FRAMES = 3


@pytest.fixture(scope="module")
def clips() -> Clips:
    return Clips.held_out(load_network(), clips=2, chunks=4)


@pytest.fixture(scope="module")
def lesson(clips) -> tuple[Teacher, torch.Tensor]:
    """The teacher, and what it made."""
    teacher = Teacher(QUICK.steps)
    return teacher, run(Method("plain"), QUICK, clips, teacher.watch).latents


def test_the_plain_run_is_its_own_teacher(clips, lesson):
    torch.testing.assert_close(taught(Method("plain"), QUICK, clips, lesson[0]), lesson[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [Method("reuse", settings=Settings(Every(4))), Method("UniPC", steps=4, solver=UniPC), Method("Euler", steps=4)],
    ids=lambda method: method.name,
)
def test_a_first_chunk_is_that_of_the_free_run_and_later_ones_are_nearer_to_the_plain_run(method, clips, lesson):
    free, forced = run(method, QUICK, clips).latents, taught(method, QUICK, clips, lesson[0])
    torch.testing.assert_close(forced[:, :, :FRAMES], free[:, :, :FRAMES], rtol=1e-4, atol=1e-4)
    plain = pixels(lesson[1])
    assert decibels(pixels(forced), plain).mean > decibels(pixels(free), plain).mean + 0.5


def test_rules_that_watch_go_along(clips, lesson):
    """Each decides by its own latents."""
    for method in peers(SETUPS["magi"], 1):
        if method.name in THRESHOLDS:
            assert taught(method, QUICK, clips, lesson[0]).shape == lesson[1].shape


def test_what_has_no_counterpart_in_the_plain_run_cannot_be_taught():
    assert not can_be_taught(Method("between", steps=3), QUICK)
    assert can_be_taught(ours(SETUPS["magi"])[0], SETUPS["magi"])
    published = next(method for method in peers(SETUPS["skyreels"], 1) if method.name == "FlowCache's rule")
    assert not can_be_taught(published, SETUPS["skyreels"])
