"""The paper's rows without a ComfyUI: the graphs, the figures, the errors."""

import pytest

from flowcache_core.errors import UserError
from flowcache_core.lab.paper import MODELS, Files, Measured, graph_of, main, seconds_of, table


@pytest.mark.parametrize("family", MODELS)
def test_every_row_has_a_whole_graph(family):
    model = MODELS[family]
    for row in model.rows:
        graph, pictures, report = graph_of(model, Files("a", "b", "c"), row, "words", 3, 2)
        for node in graph.values():
            links = [value for value in node["inputs"].values() if isinstance(value, list)]
            assert all(name in graph for name, _ in links)
        assert graph[pictures]["class_type"] == "PreviewImage" and graph[report]["class_type"] == "FlowCacheReport"
        presets = [node["inputs"]["preset"] for node in graph.values() if node["class_type"] == "FlowCache"]
        assert presets == ([row.preset] if row.preset else [])


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
