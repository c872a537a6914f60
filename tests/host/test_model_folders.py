"""Folders that hold a whole model are listed by the loader, and load."""

import json

import pytest
from safetensors.torch import save_file

from tests.helpers.host.graph import SMALL, Graph, random_network


@pytest.fixture(scope="module")
def listed(server):
    base = server.base / "models" / "diffusion_models"
    told = {"dim": SMALL.dim, "num_heads": SMALL.num_heads, "inject_sample_info": False}
    for place in ("upstream", "pipeline/transformer", "pipeline/vae"):
        (base / place).mkdir(parents=True)
        save_file(random_network(), base / place / "model.safetensors")
        (base / place / "config.json").write_text(json.dumps(told))
    (base / "pipeline" / "model_index.json").write_text("{}")
    (base / "only a folder").mkdir()
    save_file(random_network(), base / "only a folder" / "model.safetensors")
    return server.get("/object_info/FlowCacheLoadARVideoModel")["FlowCacheLoadARVideoModel"]["input"]["required"]


def test_a_folder_is_listed_once_and_as_a_whole(listed):
    names = listed["model_name"][1]["options"]
    assert {"upstream", "pipeline"} <= set(names)
    assert not {"only a folder", "pipeline/transformer", "pipeline/vae"} & set(names)


@pytest.mark.parametrize("name", ["upstream", "pipeline"])
def test_a_folder_loads(server, listed, name):
    graph = Graph()
    loaded = graph.add("FlowCacheLoadARVideoModel", model_name=name, family="auto", weight_type="default")
    graph.add("PreviewAny", source=(loaded, 0))
    outcome = server.run(graph)
    assert outcome.error is None and loaded in outcome.executed
