"""What a user gets wrong: one clear line on the right node, and the server goes on."""

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.host.comfy_server import Refused
from tests.helpers.host.graph import SMALL, Graph, fails, random_network, write_network
from tests.host.soak import Usage
from tests.host.test_extend import extend, flowcache


@pytest.fixture(scope="module", autouse=True)
def files(server):
    folder = server.base / "models" / "diffusion_models"
    weights = random_network()
    write_network(folder / "extend.safetensors", weights)
    (folder / "text.safetensors").write_bytes(b"this is no model, only some text that goes on for a while")
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04\x95 a pickle by its first bytes" + bytes(100))
    (folder / "cut.safetensors").write_bytes((folder / "extend.safetensors").read_bytes()[:100_000])
    write_network(folder / "nan.safetensors", weights | {"head.head.bias": torch.full((64,), float("nan"))})
    save_file({"some.other.weight": torch.zeros(4, 4)}, folder / "other.safetensors")
    write_network(folder / "wide.safetensors", random_network(1, type(SMALL)(**{**SMALL.__dict__, "dim": 192})))
    latents = server.base / "input"
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": torch.randn(1, 4, 4, 8, 8), **version}, latents / "four_channels.latent")
    save_file({"latent_tensor": torch.randn(1, 16, 8, 8), **version}, latents / "image.latent")
    save_file({"latent_tensor": torch.full((1, 16, 4, 8, 8), float("nan")), **version}, latents / "nan.latent")


@pytest.mark.parametrize("name", ["text", "pickle", "cut", "other"])
def test_files_that_are_no_model(server, name):
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name=f"{name}.safetensors", family="auto", weight_type="default"
    )
    extend(graph, model=(loaded, 0))
    graph.add("SaveLatent", samples=(str(len(graph)), 0), filename_prefix="s")
    assert name in fails(server, graph, loaded)


@pytest.mark.parametrize(
    "latent, words",
    [
        ("four_channels", "16"),
        ("image", "expected"),
        ("nan", "NaN"),
    ],
)
def test_prefixes_that_cannot_be_continued(server, latent, words):
    graph = Graph()
    prefix = graph.add("LoadLatent", latent=f"{latent}.latent")
    assert words in fails(server, graph, extend(graph, prefix=(prefix, 0)))


@pytest.mark.parametrize("odd", [[1, 2], "words", {"a\0b": 1}])
def test_a_workflow_that_no_file_can_hold(server, odd):
    graph = Graph()
    node = extend(graph, seed=1)
    graph.add("FlowCacheReport", report=(node, 2))
    error = server.run(graph, extra_data={"extra_pnginfo": odd}).error
    server.post("/history", {"clear": True})  # of which the host cannot list its jobs any more
    assert error["node_id"] == node and error["exception_type"].endswith("UserError"), error["exception_message"]
    assert "extra_pnginfo cannot be written" in error["exception_message"]


def test_weights_that_are_not_finite(server):
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="nan.safetensors", family="causal", weight_type="default"
    )
    assert "chunk 0" in fails(server, graph, extend(graph, model=(loaded, 0)))


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        (0, {"chunks": 10_000, "width": 1024, "height": 1024}),  # its history alone
        (2, {"chunks": 10_000, "frames_per_chunk": 64, "width": 256, "height": 256}),  # its latents
        (0, {"chunks": 10_000, "width": 1024, "height": 1024, "lag": 0, "attention": "joint"}),  # one window
    ],
)
def test_a_size_that_cannot_fit_is_refused_before_anything_is_allocated(server, budget, asked):
    graph = Graph()
    before = Usage.of(server).memory
    node = extend(graph, model=flowcache(graph, preset="off", history_budget=budget), **asked)
    words = fails(server, graph, node)
    assert "GiB beside the model, and this machine has" in words and "fewer chunks" in words
    assert Usage.of(server).memory < before + 2**27


def test_a_state_of_another_model(server):
    graph = Graph()
    begun = extend(graph)
    other = graph.add(
        "FlowCacheLoadARVideoModel", model_name="wide.safetensors", family="causal", weight_type="default"
    )
    assert "another model" in fails(server, graph, extend(graph, model=(other, 0), state=(begun, 1)))


def test_a_state_of_other_chunks_or_guidance(server):
    graph = Graph()
    begun = extend(graph)
    assert "frames a chunk" in fails(server, graph, extend(graph, state=(begun, 1), frames_per_chunk=1))
    graph = Graph()
    begun = extend(graph)
    assert "guidance" in fails(server, graph, extend(graph, state=(begun, 1), guidance=5.0))


def test_a_prefix_and_a_state_at_once(server):
    graph = Graph()
    begun = extend(graph)
    assert "Connect one" in fails(server, graph, extend(graph, state=(begun, 1), prefix=(begun, 0)))


def test_a_budget_smaller_than_what_must_stay(server):
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="extend.safetensors", family="causal", weight_type="default"
    )
    patched = graph.add("FlowCache", model=(loaded, 0), preset="off", history_budget=0, positions="relative")
    extend(graph, model=(patched, 0))
    graph.add("SaveLatent", samples=(str(len(graph)), 0), filename_prefix="s")
    assert "need a history budget" in fails(server, graph, patched)


def test_words_that_the_demo_model_does_not_know(server):
    graph = Graph()
    node = extend(graph, caption="a purple dragon")
    prompt = graph[node]["inputs"]["positive"][0]
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    assert "'purple'" in fails(server, graph, prompt)


def test_a_report_of_nothing(server):
    graph = Graph()
    node = graph.add("FlowCacheReport")
    assert "Nothing to report on" in fails(server, graph, node)


@pytest.mark.parametrize("wrong", [{"chunks": 0}, {"steps": -1}, {"lag": -2}, {"guidance": -1.0}, {"solver": "best"}])
def test_widgets_out_of_range_are_refused_before_anything_runs(server, wrong):
    graph = Graph()
    node = extend(graph, **wrong)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    with pytest.raises(Refused, match=next(iter(wrong))):
        server.run(graph)


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd"])
def test_names_that_lead_out_of_the_hosts_folders_are_refused(server, name):
    loaders = {
        "FlowCacheLoadARVideoModel": {"model_name": name, "family": "auto", "weight_type": "default"},
        "FlowCacheLoadMagiVAE": {"vae_name": name},
    }
    for kind, inputs in loaders.items():
        graph = Graph()
        graph.add("PreviewAny", source=(graph.add(kind, **inputs), 0))
        with pytest.raises(Refused, match="not in list"):
            server.run(graph)


@pytest.mark.parametrize("how", ["handed on", "patched"])
def test_models_of_raylight(server, how):
    graph = Graph()
    if how == "patched":
        loaded = graph.add(
            "FlowCacheLoadARVideoModel", model_name="extend.safetensors", family="causal", weight_type="default"
        )
        model = graph.add("TestPatched", model=(loaded, 0), kind="Raylight"), 0
    else:
        model = graph.add("TestWrongObject", name="MODEL: Raylight's actors"), 0
    assert "is of Raylight" in fails(server, graph, extend(graph, model=model))
