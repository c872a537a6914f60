"""The paper's rows without a ComfyUI: the graphs, the figures, the errors."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.lab.paper import MODELS, Files, Measured, frames_of, main, run_of, seconds_of, table


def nodes(graph, kind):
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


@pytest.mark.parametrize("family", MODELS)
def test_every_row_has_a_whole_graph(family):
    model = MODELS[family]
    for row in model.rows:
        run = run_of(model, Files("a", "b", "c"), row, "words", 3, model.windows)
        for node in run.graph.values():
            links = [value for value in node["inputs"].values() if isinstance(value, list)]
            assert all(name in run.graph for name, _ in links)
        assert [run.graph[name]["class_type"] for name in run.pictures] == ["PreviewImage"] * len(model.windows)
        assert [run.graph[name]["class_type"] for name in run.reports] == ["FlowCacheReport"] * len(model.windows)
        presets = [node["preset"] for node in nodes(run.graph, "FlowCache")]
        assert presets == ([row.preset] if row.preset else [])


def test_skyreels_rows_are_177_frames_in_windows_of_97():
    model = MODELS["skyreels"]
    first, second = model.windows
    assert (frames_of(model, first, False), frames_of(model, second, True)) == (97, 97)
    assert frames_of(model, first, False) + frames_of(model, second, True) - model.overlap == 177
    run = run_of(model, Files("a", "b", "c"), model.rows[0], "words", 3, model.windows)
    (taken,) = nodes(run.graph, "ImageFromBatch")
    assert (taken["batch_index"], taken["length"]) == (80, 17)
    one, two = nodes(run.graph, "FlowCacheAutoregressiveExtend")
    assert (
        "prefix" not in one
        and two["condition_noise"] == 0.02
        and run.graph[two["prefix"][0]]["class_type"] == "VAEEncode"
    )


def test_teacaches_rows_hold_the_last_result_by_its_rule():
    for model in MODELS.values():
        rows = [row for row in model.rows if row.name.startswith("TeaCache")]
        assert len(rows) == 2
        for row in rows:
            (node,) = nodes(run_of(model, Files(), row, "words", 3, (1,)).graph, "FlowCache")
            assert (node["policy"], node["threshold"], node["warmup"]) == ("teacache", row.threshold, 5)
            assert (node["forecast"], node["correct"]) == ("hold", False)


def test_the_table_has_the_papers_figures_beside():
    vanilla, slow = (row for row in MODELS["magi"].rows if row.name in ("vanilla", "FlowCache slow"))
    words = table([Measured(vanilla, [30.0, 10.0]), Measured(slow, [10.0, 10.0], [0.5, 0.7], [20.0, 22.0])])
    assert "| FlowCache slow | 10.0 | 2.00x | 0.6000 | 21.00 | 1.86x | 0.6497 | 22.34 |" in words


def test_the_time_is_the_reports():
    assert seconds_of("settings\nforwards: 3\ntime: 12.5 s, 1.20 s a chunk") == 12.5
    with pytest.raises(UserError, match="no time"):
        seconds_of("nothing")


def test_no_comfyui_is_one_line(tmp_path, capsys):
    assert main(["demo", "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "x.md")]) == 2
    assert "There is no ComfyUI at http://127.0.0.1:9" in capsys.readouterr().err
