"""The quality knob: what a calibration says is what a run gets, and files that say nonsense are refused."""

import json
import random
import time

import pytest

from flowcache_core.demo import NETWORK_FILE
from flowcache_core.errors import UserError
from flowcache_core.models.presets import measured_steps, quality_settings, recomputing
from flowcache_core.reuse.calibration import Calibration, Measured, decibels
from flowcache_core.reuse.placement import place_steps
from flowcache_core.reuse.search import improved, lengthened, moved, search_calibration, work
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF
from flowcache_core.storage.calibrations import (
    SHIPPED,
    calibration_path,
    fingerprint,
    load_calibration,
    save_calibration,
)

MADE = Calibration(8, 4, 3, 2, (Measured((0, 4), 30.0), Measured((0, 4, 6), 37.5), Measured((0, 2, 4, 6), 46.0)))


def chosen(quality, schedule=ChunkSchedule(2, 8, 4)):
    return sorted(quality_settings(quality, MADE).reuse.policy(schedule).recomputed(schedule.steps))


def test_the_fewest_steps_that_reach_the_quality():
    assert chosen(0.0) == [0, 4]
    assert chosen(0.2) == [0, 4, 6]  # 30.8 dB
    assert chosen("balanced") == [0, 2, 4, 6]  # 38 dB
    assert quality_settings("lossless", MADE) == OFF
    assert quality_settings(0.9, MADE) == OFF  # more than any list reaches


def test_on_another_schedule_as_large_a_share():
    policy = measured_steps(tuple(range(0, 64, 4)), 64, 16).policy(ChunkSchedule(2, 32, 8))
    assert len(policy.recomputed(32)) == 8


@pytest.mark.parametrize("wrong", [-0.1, 1.5, "best"])
def test_impossible_qualities_are_refused(wrong):
    with pytest.raises(UserError, match="expected 0 to 1"):
        quality_settings(wrong, MADE)


def test_of_a_folder_it_lies_inside(tmp_path):
    """A folder's name may hold a dot, as SkyReels-V2-DF-1.3B-540P's does."""
    folder = tmp_path / "SkyReels-V2-DF-1.3B-540P"
    assert calibration_path(folder.with_suffix(".safetensors")).parent == tmp_path
    folder.mkdir()
    assert calibration_path(folder).parent == folder


def test_saved_and_read_again(tmp_path):
    path = calibration_path(tmp_path / "model.safetensors")
    assert path.name == "model.flowcache.json"
    save_calibration(MADE, path)
    assert load_calibration(path) == MADE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.pop("format"),
        lambda told: told.update(format="other"),
        lambda told: told.pop("lag"),
        lambda told: told["curve"][0].update(steps=[3, 1]),
        lambda told: told["curve"][0].update(steps=[0, 99]),
        lambda told: told["curve"][0].update(psnr="much"),
        lambda told: told.update(curve=7),
        lambda told: told.update(weights=7),
    ],
)
def test_damaged_files_are_refused(tmp_path, spoil):
    path = tmp_path / "model.flowcache.json"
    save_calibration(MADE, path)
    told = json.loads(path.read_text())
    spoil(told)
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="calibrate the model again"):
        load_calibration(path)


def test_what_ships_is_sound_and_more_steps_are_more_alike():
    shipped = load_calibration(SHIPPED)
    assert (shipped.steps, shipped.lag) == (64, 16)
    counts = [len(one.steps) for one in shipped.curve]
    assert counts == sorted(set(counts))
    assert shipped.curve[-1].psnr > shipped.curve[0].psnr + 6
    assert recomputing(counts[0], 64, 16).steps == shipped.curve[0].steps


def test_the_search_finds_a_better_list():
    schedule = ChunkSchedule(4, 16, 4)
    best = (0, 2, 6, 10, 14)

    def score(steps):
        return -sum(min(abs(step - other) for other in steps) for step in best)

    start = place_steps(schedule, 5)
    found = improved(start, schedule, score, time.monotonic() + 1.0, random.Random(0))[0]
    assert score(found) > score(start) and len(found) == 5 and found[0] == 0
    assert all(len(moved(best, schedule, random.Random(seed))) == 5 for seed in range(50))


def test_a_calibration_measures_what_it_found():
    schedule = ChunkSchedule(2, 8, 4)
    made = search_calibration(
        schedule, 3, lambda steps: float(len(steps)), lambda steps: 10.0 * len(steps), 0.0, counts=(2, 4, 30)
    )
    assert [(len(one.steps), one.psnr) for one in made.curve] == [(2, 20.0), (4, 40.0)]
    assert (made.steps, made.lag, made.chunks, made.clips) == (8, 4, 2, 3)


def test_what_is_best_on_the_clips_of_the_search_is_confirmed_on_others():
    """Two lists of each length are measured; a longer one that is no better than a shorter one does not ship."""
    schedule, told, measured = ChunkSchedule(4, 16, 4), [], []

    def final(steps):
        measured.append(steps)
        return 40.0 + len(measured) if len(steps) < 6 else 41.5

    made = search_calibration(schedule, 2, lambda steps: -sum(steps) / 100, final, 0.2, counts=(5, 6), told=told.append)
    assert [len(steps) for steps in measured] == [5, 5, 6, 6]
    assert made.curve == (Measured(measured[1], 42.0),)
    assert told[-1] == "6 steps are left out: no better than 5"


def test_a_step_alone_costs_what_is_said():
    schedule = ChunkSchedule(16, 64, 16)
    company = (0, 16, 32, 48)
    assert work(company, schedule, 2.0) == pytest.approx(4.0)  # one call for the four chunks of a tick
    assert work((*company, 63), schedule, 2.0) == pytest.approx(6.0)
    assert work((*company, 63), schedule, 1.0) == 5.0
    assert work((0, 1, 2), ChunkSchedule(4, 4, 4), 2.0) == 3.0  # one chunk at a time: there is no company


def test_a_longer_list_may_begin_as_a_shorter_one():
    schedule = ChunkSchedule(4, 16, 4)
    assert lengthened((0, 4, 12), schedule, 5) == (0, 2, 4, 8, 12)
    made = search_calibration(
        schedule, 1, lambda steps: 9.0 if {0, 1, 15} <= {*steps} else 1.0, lambda steps: float(len(steps)), 0.0,
        counts=(3, 5), known=Calibration(16, 4, 1, 1, (Measured((0, 1, 15), 1.0),)),
    )  # fmt: skip
    assert {0, 1, 15} <= {*made.curve[1].steps}


def test_what_ships_was_measured_with_what_ships():
    assert load_calibration(SHIPPED).weights == fingerprint(NETWORK_FILE)


def test_decibels_rise_with_quality():
    assert [decibels(quality) for quality in (0.0, 0.5, 1.0)] == [26.0, 38.0, float("inf")]


def test_an_earlier_calibration_is_begun_with_where_it_is_better():
    schedule, best = ChunkSchedule(3, 8, 4), (0, 4, 6)

    def score(steps):
        return 40.0 if steps == best else 20.0

    begun = search_calibration(schedule, 1, score, score, 0.0, counts=(3,), known=MADE)
    assert begun.curve == (Measured(best, 40.0),)
    elsewhere = search_calibration(ChunkSchedule(3, 8, 8), 1, score, score, 0.0, counts=(3,), known=MADE)
    assert elsewhere.curve[0].steps == place_steps(ChunkSchedule(3, 8, 8), 3)


def test_a_search_ends_when_its_time_is_over():
    tried = []

    def score(steps):
        tried.append(steps)
        time.sleep(0.01)
        return 1.0

    search_calibration(ChunkSchedule(4, 64, 16), 1, score, lambda steps: 0.0, 0.5, counts=(5, 8))
    assert len(tried) < 60  # half a second's worth, and the lists that it begins with
