"""The paper's rows without a ComfyUI: the graphs, the files, the figures, the errors."""

import json
import re

import numpy as np
import pytest

from flowcache_core.errors import UserError
from flowcache_core.lab import paper
from flowcache_core.lab.flops import layer_token_flops
from flowcache_core.lab.paper_rows import MODELS, Files, Published, Row, frames_of, run_of
from flowcache_core.lab.paper_table import Figures, likeness_of, table
from flowcache_core.media.video import read_video


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
        presets = [(node["preset"], node["history_budget"]) for node in nodes(run.graph, "FlowCache")]
        assert presets == ([(row.preset, row.budget)] if row.preset else [])


def test_the_published_rule_stands_with_its_compression_and_without():
    for family, budget in (("skyreels", 1), ("magi", 2)):
        found = {(row.preset, row.budget) for row in MODELS[family].rows}
        assert {("paper slow", 0), ("paper fast", 0), ("paper slow", budget), ("paper fast", budget)} <= found


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


def test_videos_have_the_names_that_the_benchmarks_look_for(tmp_path):
    model = MODELS["demo"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("A cat, running\n\n  a dog\n")
    made = paper.prompts_of(lines, model, 2, 7)
    assert [(prompt.file, prompt.seed) for prompt in made] == [
        ("A cat, running-0.mp4", 7), ("A cat, running-1.mp4", 8), ("a dog-0.mp4", 7), ("a dog-1.mp4", 8),
    ]  # fmt: skip
    assert len(paper.file_name("é" * 400, 0).encode()) <= 255 and paper.file_name("a/b", 0) == "a_b-0.mp4"
    listed = tmp_path / "descriptions.csv"
    listed.write_text('scenario,description,generated_video_name\n0001_x,"A ball, falling",0001_ball.mp4\n')
    (physics,) = paper.prompts_of(listed, model, 1, 7)
    assert (physics.text, physics.file) == ("A ball, falling", "0001_ball.mp4")
    listed.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no columns"):
        paper.prompts_of(listed, model, 1, 7)
    (job, *_) = paper.jobs_of(model, made, tmp_path)
    assert job.video == tmp_path / "vanilla" / "videos" / "A cat, running-0.mp4"
    folders = [paper.folder_name(row) for every in MODELS.values() for row in every.rows]
    assert all(re.fullmatch(r"[a-z0-9_.]+", folder) for folder in folders)


def test_parts_share_the_prompts():
    prompts = list(range(7))
    parts = [paper.part_of(prompts, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(sum(parts, [])) == prompts and max(map(len, parts)) == 3
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(UserError, match="such as 2/4"):
            paper.part_of(prompts, wrong)


class Pretended:
    """A ComfyUI that answers a graph with frames drawn from it, and fails at some of its runs."""

    def __init__(self, fails: int = -1):
        self.graphs, self.fails = [], fails

    def run(self, graph):
        if len(self.graphs) == self.fails:
            raise UserError("out of memory")
        self.graphs.append(graph)
        told = {"seconds": 2.0, "attention_flops": 10**15, "layer_tokens": 1000, "device_bytes_peak": 2**31}
        return {
            key: {"report": [json.dumps(told)]}
            for key, node in graph.items()
            if node["class_type"] == "FlowCacheReport"
        }

    def pictures(self, outputs, node):
        draw = np.random.default_rng(len(self.graphs))
        return draw.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def work(tmp_path):
    model = MODELS["demo"]
    jobs = paper.jobs_of(model, [paper.Prompt("words", "words-0.mp4", 1)], tmp_path)
    return model, jobs


def maker(model, server) -> paper.Maker:
    return paper.Maker(server, model, Files(), (1,))


def test_a_run_goes_on_where_it_was_ended_and_makes_nothing_twice(work):
    model, jobs = work
    failing = Pretended(fails=4)  # after the short run and three rows
    with pytest.raises(UserError, match="out of memory"):
        paper.make_all([maker(model, failing)], jobs)
    assert [job.video.exists() for job in jobs] == [number < 3 for number in range(len(jobs))]
    assert table(paper.figures_of(model, jobs)) == "No prompt has the videos of all rows yet."
    again = Pretended()
    paper.make_all([maker(model, again)], jobs)
    assert len(again.graphs) == 1 + len(jobs) - 3
    third = Pretended()
    paper.make_all([maker(model, third)], jobs)
    assert third.graphs == []  # not even the short run
    jobs[1].told.write_text('{"grap')  # ended while it was written
    paper.make_all([maker(model, third)], jobs)
    assert len(third.graphs) == 2


def test_another_seed_is_made_anew(work):
    model, jobs = work
    paper.make_all([maker(model, Pretended())], jobs)
    moved = [paper.Job(job.row, paper.Prompt("words", "words-0.mp4", 2), job.videos, job.runs) for job in jobs]
    server = Pretended()
    paper.make_all([maker(model, server)], moved)
    assert len(server.graphs) == 1 + len(jobs)


def test_several_servers_share_the_work(tmp_path):
    model = MODELS["demo"]
    jobs = paper.jobs_of(model, [paper.Prompt(f"words {n}", f"{n}-0.mp4", n) for n in range(3)], tmp_path)
    servers = [Pretended(), Pretended()]
    paper.make_all([maker(model, server) for server in servers], jobs)
    assert all(job.video.exists() for job in jobs)
    assert sum(len(server.graphs) - bool(server.graphs) for server in servers) == len(jobs)


def test_the_figures_are_those_of_the_files(work):
    model, jobs = work
    paper.make_all([maker(model, Pretended())], jobs)
    plain, other, *_ = paper.figures_of(model, jobs)
    assert plain.seconds == [2.0] and plain.alike == {}
    assert plain.device_bytes == [2**31]
    assert plain.flops == [10**15 + 1000 * layer_token_flops(model.config, model.text_tokens)]
    first, second = (read_video(job.video) for job in jobs[:2])
    assert {name: values[0] for name, values in other.alike.items()} == pytest.approx(likeness_of(second, first))
    kept = json.loads(jobs[1].told.read_text())["likeness"]["values"]
    assert kept == pytest.approx(likeness_of(second, first))
    jobs[1].told.write_text(json.dumps(json.loads(jobs[1].told.read_text()) | {"likeness": {"to": "other"}}))
    assert paper.figures_of(model, jobs)[1].alike == other.alike  # measured anew for another plain video


def test_the_table_has_the_papers_figures_beside():
    vanilla, slow = (row for row in MODELS["magi"].rows if row.name in ("vanilla", "FlowCache slow"))
    plain = Figures(vanilla, [30.0, 10.0], [2 * 10**17, 4 * 10**17], [3 * 2**30, 2**30])
    fast = Figures(slow, [10.0, 10.0], [10**17, 10**17], [0, 0], {"SSIM": [0.5, 0.7], "PSNR": [20.0, 22.0]})
    words = table([plain, fast])
    assert "| vanilla | 20.0 | 1.00x | 300 | 3.0 |  |  |  |  | 306 | 1.00 | 77.06 |  |  |  |" in words
    measured = "| FlowCache slow | 10.0 | 2.00x | 100 |  | 0.6000 | 21.00 |  |  "
    expected = measured + "| 161 | 1.86 | 78.96 | 0.3160 | 0.6497 | 22.34 |"
    assert expected in words and "Means over 2 videos" in words


def test_a_row_without_published_figures_is_whole():
    words = table([Figures(Row("own", "high", published=Published()), [1.0], [1], [0])])
    assert words.splitlines()[2] == "| own | 1.0 | 1.00x | 1e-15 |  |  |  |  |  |  |  |  |  |  |  |"


def test_no_comfyui_is_one_line(tmp_path, capsys):
    assert paper.main(["demo", "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "x")]) == 2
    assert "There is no ComfyUI at http://127.0.0.1:9" in capsys.readouterr().err
