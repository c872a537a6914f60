"""The script of the paper's rows, on the model that ships."""

from dataclasses import replace

from flowcache_core.lab import paper
from flowcache_core.lab.paper_rows import MODELS


def test_the_demo_models_rows(server, tmp_path, capsys, monkeypatch):
    demo = MODELS["demo"]
    few = [row for row in demo.rows if row.name in ("vanilla", "FlowCache slow, budget 2", "ours, high", "ours, fast")]
    monkeypatch.setitem(MODELS, "demo", replace(demo, rows=tuple(few)))  # what each row is, is a test without a host
    asked = ["demo", "--server", server.address, "--chunks", "1", "--out", str(tmp_path)]
    assert paper.main(asked) == 0
    words = (tmp_path / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in words.splitlines()[2:] if "|" in line]
    names = [row.name for row in MODELS["demo"].rows]
    assert [row[0] for row in rows] == names
    speedup, pflops, psnr = ({row[0]: row[column].rstrip("x") for row in rows} for column in (2, 3, 6))
    assert float(speedup["vanilla"]) == 1.0
    assert all(0 < float(pflops[name]) < float(pflops["vanilla"]) for name in names[1:])
    assert all(15 < float(psnr[name]) <= 100 for name in names[1:])
    assert float(psnr["ours, high"]) > float(psnr["ours, fast"])
    assert len(list(tmp_path.glob("*/videos/a red circle and a blue square-0.mp4"))) == len(names)
    capsys.readouterr()
    assert paper.main(asked) == 0  # nothing is left to make
    said = capsys.readouterr()
    assert said.err.count("is there: ") == len(names) and "made: " not in said.err and said.out.strip() == words.strip()


def test_a_graph_that_fails_is_one_line(server, tmp_path, capsys):
    arguments = ["demo", "--server", server.address, "--model", "missing.safetensors", "--out", str(tmp_path / "x")]
    assert paper.main(arguments) == 2
    words = capsys.readouterr().err
    assert words.startswith("error: ") and "missing.safetensors" in words
    assert not list((tmp_path / "x").glob("**/*.mp4"))
