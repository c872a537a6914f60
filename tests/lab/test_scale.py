"""The counts at real size, held against what was recorded; more of anything fails and says what grew.

`.venv/bin/python -m flowcache_core.lab.scale --record tests/lab/scale_budget.json` records them anew.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from flowcache_core.lab.meter import Meter, Work
from flowcache_core.lab.real_size import MODELS, Model, Steady, attention_work, count_steady, model_of, seen_chunks
from flowcache_core.lab.roofline import CONSUMER, H100, RTX_4060, RTX_4090
from flowcache_core.lab.scale import HELD, Case, Counted, count, fits, grown, held_figures, row
from flowcache_core.lab.scale_page import page
from flowcache_core.lab.stock import count_stock
from flowcache_core.lab.traffic import traffic_rows
from flowcache_core.models.longvie import LongVieConfig
from flowcache_core.models.memory import pictures_bytes
from flowcache_core.models.wan import WanConfig

BUDGET = Path(__file__).with_name("scale_budget.json")
TINY = Model("tiny", "skyreels", WanConfig(96, 192, 2, 3), (64, 64), 2)


@pytest.fixture(scope="module")
def counted() -> dict[Case, Counted]:
    return {case: count(case) for case in HELD}


def test_counts_have_not_grown(counted):
    recorded = json.loads(BUDGET.read_text())
    assert grown(recorded, {str(case): held_figures(one) for case, one in counted.items()}) == []


def test_growth_is_told_with_what_grew_and_by_how_much():
    recorded = {"a": {"cut: launches": 100.0, "forward: bytes": 10.0}}
    assert grown(recorded, {"a": {"cut: launches": 100.0, "forward: bytes": 9.0}}) == []
    told = grown(recorded, {"a": {"cut: launches": 103.0, "forward: bytes": 10.0}})
    assert told == ["a: cut: launches grew from 100 to 103 (+3.0%)"]
    assert grown(recorded, {"b": {}}) == ["b was not recorded"]


def figures(steady: Steady) -> dict:
    """Of all parts; a launch over all layers at once is another kernel for each number of them."""
    values = {field.name: getattr(steady, field.name) for field in fields(steady)}
    return {
        name: (value.launches, value.bytes, value.flops, value.read_backs) if isinstance(value, Work) else value
        for name, value in values.items()
    }


def test_layers_are_alike():
    model = MODELS[0]
    settings = model.settings("plain", bounded=True)
    one, two, three = (count_steady(model, layers, settings) for layers in (1, 2, 3))
    assert figures(one.in_layers(two, 3)) == figures(three)


def test_layers_with_control_blocks_are_alike_too():
    model = model_of("longvie")
    settings = model.settings("fast", bounded=False)

    def counts(layers: int, led: int) -> Steady:
        return count_steady(model, layers, settings, led)

    two = counts(2, 1)
    worked_out = counts(1, 1).in_layers(two, 4).with_layers(two, counts(2, 2), 2)
    assert figures(worked_out) == figures(counts(4, 3))


def test_a_chunk_of_longvie_takes_what_is_planned_and_no_history():
    model = replace(model_of("longvie"), config=LongVieConfig(5120, 13824, 40, 3, control_layers=2))
    steady = count(Case(model, "fast", False)).steady
    assert (steady.history, steady.cut.launches) == (0, 0)
    planned = pictures_bytes(model.config, model.family, model.size)
    assert 1.0 <= planned / (steady.activations + steady.held) <= 1.15


def test_a_step_runs_one_of_two_networks_and_a_clean_pass_both():
    model = model_of("experts")
    alone = replace(model, family_name="causal")
    plain = [count(Case(each, "plain", True)) for each in (model, alone)]
    assert [one.steady.passes for one in plain] == [8 + 2, 4 + 1]
    both, one = (each.steady.cut.launches for each in plain)
    assert both == 2 * one and plain[0].planned == pytest.approx(2 * plain[1].planned, rel=1e-6)
    assert plain[0].steady.history == pytest.approx(plain[0].planned, rel=1e-6)
    a_pass = [each.steady.attention.flops / each.steady.passes for each in plain]
    assert a_pass[0] == pytest.approx(a_pass[1], rel=0.02)


@pytest.mark.parametrize(
    ("preset", "bounded"), [("plain", False), ("plain", True), ("balanced", False), ("fast", True)]
)
@pytest.mark.parametrize("family", ["skyreels", "causal", "experts"])
def test_what_forwards_see_follows_from_the_schedule(family, preset, bounded):
    """A small network's whole run, gone through."""
    model = replace(TINY, family_name=family)
    settings, meter = model.settings(preset, bounded), Meter()
    engine = model.metered(1, settings, 12, meter)
    with meter:
        list(engine.run())
        with torch.inference_mode():
            engine.forward.settle()
    recomputed = settings.reuse.policy(engine.schedule).recomputed(engine.schedule.steps)
    if family == "experts":
        recomputed = count_steady(model, 1, settings).asked  # where the network changes, too
    seen = seen_chunks(engine.schedule, recomputed, settings.history.budget, model.networks)
    worked_out = attention_work(
        replace(model, config=replace(model.config, num_layers=1)), seen, len(engine.forward.histories)
    )
    assert meter.parts["attention"] == worked_out


def test_a_bounded_run_goes_on_as_in_its_middle(counted):
    """Every lag of ticks is like the one that was counted."""
    for case, one in counted.items():
        model, settings = case.model, case.settings
        if case.bounded and isinstance(model.config, WanConfig):
            schedules = [model.schedule(chunks) for chunks in (20, 21)]
            recomputed = settings.reuse.policy(schedules[0]).recomputed(schedules[0].steps)
            short, long = (seen_chunks(schedule, recomputed, model.budget) for schedule in schedules)
            long.subtract(short)
            branches = 1 if model.family.guidance == 1.0 else 2
            assert attention_work(model, +long, branches) == one.steady.attention


def test_products_are_those_of_the_formulas(counted):
    """In a causal block: four products of the width and two of the inner layer; of the text's, two are made once."""
    one = counted[Case(MODELS[0], "plain", True)]
    tokens, dim, inner = 3 * 30 * 52, 1536, 8960
    a_layer = 2 * tokens * (6 * dim * dim + 2 * dim * inner) + 4 * tokens * 512 * dim
    found = one.steady.network.flops / one.steady.passes / 30
    assert found == pytest.approx(a_layer, rel=0.01)


def test_planned_memory_is_what_was_counted(counted):
    for case, one in counted.items():
        plan, steady = one.plan, one.steady
        assert steady.history == pytest.approx(one.planned, rel=1e-6), case
        assert 1.0 <= plan.activation_bytes / steady.activations <= 1.15, case
        assert 0.97 <= (plan.context_bytes + plan.table_bytes) / steady.held <= 1.15, case
        assert 1.0 <= plan.bytes / (steady.history + steady.activations + steady.held) <= 1.15, case


def test_the_page_has_every_row(counted):
    rows = [row(one) for one in counted.values()]
    other = [row(count(Case(MODELS[0], "plain", False)))]
    first = MODELS[0]
    gpus = traffic_rows([first], {(first.name, *first.size): 1.0})
    report = {"rows": [*rows[:1], *other], "stock": [], "published_rules": [], "fits": [], "gpus": gpus}
    words = page(report)
    assert "| plain | 3 |" in words and "| plain | – |" in words and "its decode" not in words
    given = {name: rows[0][name] for name in ("model", "size")}
    chunk = rows[0]["chunk"]
    report["stock"] = [
        given | {"forward": rows[0]["forward"], "decode": chunk | {"seconds": {RTX_4090.name: 1, H100.name: 9}}}
    ]
    assert "| RTX 4090 | 1.48 | 0.37 | 1.00 | 1.00 | 0.63 | 0.00 |" in page(report)


def test_a_smaller_card_holds_less(counted):
    bounded = counted[Case(MODELS[0], "plain", True)]
    whole = count(Case(MODELS[0], "plain", False))
    found = [fits(whole, bounded, card)[0] for card in (*CONSUMER, H100)]
    assert all(found)
    lengths = [fit.seconds_whole["as computed"] for fit in found]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    assert all(fit.gigabytes <= fit.card.memory for fit in found)
    none, least = fits(whole, bounded, replace(RTX_4060, memory=1))
    assert none is None and least > 1


def test_stock_is_counted_where_there_is_a_host(monkeypatch):
    monkeypatch.setattr("flowcache_core.lab.stock.HOST", Path("/nowhere"))
    assert count_stock(MODELS) == {}


def test_work_survives_json():
    work = Work()
    with Meter() as meter:
        torch.empty(3, device="meta") + 1
    assert Work.from_list(json.loads(json.dumps(meter.work.to_list()))) == meter.work != work
