"""The script of the paper's rows, on the model that ships."""

from flowcache_core.lab import paper


def test_the_demo_models_rows(server, tmp_path, capsys):
    out = tmp_path / "paper.md"
    assert paper.main(["demo", "--server", server.address, "--chunks", "1", "--out", str(out)]) == 0
    rows = [line.split(" | ") for line in out.read_text().splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [row.name for row in paper.MODELS["demo"].rows]
    speedups = {row[0].strip("| "): float(row[2].rstrip("x")) for row in rows}
    likeness = {row[0].strip("| "): float(row[4]) for row in rows[1:]}
    assert speedups["vanilla"] == 1.0 and all(15 < value <= 100 for value in likeness.values())
    assert likeness["ours, high"] > likeness["ours, fast"]
    assert capsys.readouterr().out.strip() == out.read_text().strip()


def test_a_graph_that_fails_is_one_line(server, tmp_path, capsys):
    arguments = ["demo", "--server", server.address, "--model", "missing.safetensors", "--out", str(tmp_path / "x.md")]
    assert paper.main(arguments) == 2
    words = capsys.readouterr().err
    assert words.startswith("error: ") and "missing.safetensors" in words
    assert not (tmp_path / "x.md").exists()
