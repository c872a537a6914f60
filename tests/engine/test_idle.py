"""Settings that reuse nothing are told, with others that do."""

from dataclasses import replace
from itertools import product

import pytest

from flowcache_core import demo, generate
from flowcache_core.engine.idle import better, idle_notes, reuses
from flowcache_core.models.families import FAMILIES
from flowcache_core.models.presets import PRESETS
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Drift, Every, Fixed, Off, Settings, Spread

CASES = [
    *(Every(n, warmup=warmup) for n, warmup in product((1, 2, 3, 4, 5, 7, 64), (0, 1, 5, 20))),
    *(Drift(0.1, warmup, last) for warmup, last in product((1, 4, 5, 30), (False, True))),
    *(Spread(share, least) for share, least in product((0.1, 0.5, 1.0), (1, 4, 10))),
    Fixed(range(64)),
    Fixed((0,)),
]
SCHEDULES = [ChunkSchedule(4, steps, lag) for steps in (1, 2, 3, 4, 5, 8, 22) for lag in range(0, steps + 1)]


def test_a_note_exactly_where_nothing_is_reused_and_its_advice_holds():
    told = 0
    for reuse, schedule in product(CASES, SCHEDULES):
        notes = idle_notes(reuse, schedule)
        assert (not notes) == reuses(reuse, schedule), (reuse, schedule, notes)
        if not notes:
            continue
        (note,) = notes
        told += 1
        found = better(reuse, schedule)
        assert found is None or reuses(*found)
        assert (found is None) == (schedule.steps < 2), (reuse, schedule)
        assert "\n" not in note and note.startswith("nothing is reused: ")
        if found and isinstance(found[0], Every) and found[0].n != getattr(reuse, "n", 0):
            assert f"every {found[0].n}" in note
        if found and found[1].lag != schedule.lag:
            assert f"lag {found[1].lag}" in note
    assert told > 100


def test_who_asks_for_nothing_is_told_nothing():
    assert not any(idle_notes(Off(), schedule) for schedule in SCHEDULES)


# Presets that reuse something of a family that takes 5 or 8 steps.
OF_FEW_STEPS = {"krea": ["fast"], "experts": ["balanced", "fast", "paper slow", "paper fast"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_presets_reuse_on_every_family_of_many_steps(name):
    usual = FAMILIES[name]
    schedule = ChunkSchedule(8, usual.steps, usual.lag)
    for title, preset in PRESETS.items():
        some = title in OF_FEW_STEPS.get(name, ())
        assert (not idle_notes(preset.reuse, schedule)) == (usual.steps > 8 or preset == OFF or some)


def test_the_report_says_it():
    backbone, text = demo.load_network(), demo.embed_caption("a red circle")
    idle = generate(backbone, text, 2, steps=10, lag=5, settings=Settings(Every(4))).report
    assert "chunks start 5 ticks apart, which nothing from 2 to 4 divides; every 5 does" in idle.text()
    assert idle.reused == 0 and generate(backbone, text, 2, steps=10, lag=5, settings=Settings(Every(5))).report.reused
    watched = generate(backbone, text, 2, steps=10, lag=5, settings=Settings(Drift(1e-6, 1))).report
    (note,) = watched.notes
    assert watched.reused == 0 and "the threshold is 1e-06; one above" in note
    above = float(note.split("one above ")[1].split()[0]) * 1.01
    more = generate(backbone, text, 2, steps=10, lag=5, settings=Settings(Drift(above, 1))).report
    assert more.reused > 0 and not more.notes


def test_a_wide_warm_up_is_named():
    (note,) = idle_notes(Every(2, warmup=8), ChunkSchedule(2, 6, 6))
    assert note == "nothing is reused: the warm-up of 8 leaves none of a chunk's 6 steps; warmup 5 does"
    assert replace(Every(2, warmup=8), warmup=5) == Every(2, warmup=5)
