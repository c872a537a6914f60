"""A state as a file: the video goes on from it as if there had been no break, and strangers' files are refused."""

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.storage.state import load_state
from tests.helpers.host.comfy_server import Refused
from tests.helpers.host.graph import SMALL, Graph, fails, random_network, sample, write_network
from tests.host.test_extend import extend, flowcache


@pytest.fixture(scope="module", autouse=True)
def networks(server):
    folder = server.base / "models" / "diffusion_models"
    write_network(folder / "extend.safetensors", random_network())
    wide = type(SMALL)(**{**SMALL.__dict__, "dim": 192})
    write_network(folder / "wide.safetensors", random_network(1, wide), wide)
    (server.base / "input" / "flowcache_states").mkdir(exist_ok=True)


def saved(server, prefix: str, **inputs) -> tuple[str, str]:
    """The name of a state that was saved, and what its node says."""
    graph = Graph()
    node = extend(graph, model=flowcache(graph, preset="high", history_budget=1), seed=80, **inputs)
    save = graph.add("FlowCacheSaveState", state=(node, 1), filename_prefix=prefix)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, save)
    root = server.base / "output" / "flowcache_states"
    return str(file.relative_to(root)), outcome.outputs[save]["text"][0]


@pytest.mark.parametrize("lag", [4, 1])
def test_a_video_goes_on_from_a_file_with_the_same_bits(server, lag):
    whole = Graph()
    model = flowcache(whole, preset="high", history_budget=1)
    begun = extend(whole, model=model, seed=80, lag=lag)
    expected = sample(server, whole, extend(whole, model=model, seed=81, lag=lag, state=(begun, 1)))
    name, told = saved(server, f"videos/{lag}", lag=lag)
    assert "64 x 64 pixels, 4 latent frames, 2 a chunk" in told and "WanModel 96x3" in told and name in f"videos/{told}"
    server.free()
    graph = Graph()
    state = graph.add("FlowCacheLoadState", state_name=name)
    node = extend(graph, model=flowcache(graph, preset="high", history_budget=1), seed=81, lag=lag, state=(state, 0))
    assert torch.equal(sample(server, graph, node), expected)


def test_a_loaded_state_is_shown_and_another_model_refuses_it(server):
    name, _ = saved(server, "shown")
    graph = Graph()
    state = graph.add("FlowCacheLoadState", state_name=name)
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="wide.safetensors", family="causal", weight_type="default"
    )
    node = extend(graph, model=(loaded, 0), state=(state, 0))
    assert "made with another model" in fails(server, graph, node)
    graph = Graph()
    state = graph.add("FlowCacheLoadState", state_name=name)
    graph.add("SaveLatent", samples=(extend(graph, state=(state, 0), seed=82), 0), filename_prefix="s")
    server.free()  # it has been read, and would not be again
    texts = [text for node, text in server.run(graph).texts if node == state]
    assert any("64 x 64 pixels, 4 latent frames" in text for text in texts)


def test_a_file_that_is_no_state_is_refused(server):
    name, _ = saved(server, "strange")
    strange = server.base / "input" / "flowcache_states"
    content = (server.base / "output" / "flowcache_states" / name).read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    (strange / "cut.safetensors").write_bytes(content[:-100])
    (strange / "flipped.safetensors").write_bytes(flipped)
    save_file({"latents": torch.zeros(1)}, strange / "other.safetensors")
    for file, words in (("cut", "Cannot read a state"), ("flipped", "damaged state"), ("other", "no FlowCache state")):
        graph = Graph()
        state = graph.add("FlowCacheLoadState", state_name=f"{file}.safetensors")
        graph.add("SaveLatent", samples=(extend(graph, state=(state, 0)), 0), filename_prefix="s")
        assert words in fails(server, graph, state)


@pytest.mark.parametrize("name", ["../state.safetensors", "/etc/passwd", "none.safetensors"])
def test_a_name_outside_the_list_is_refused(server, name):
    graph = Graph()
    state = graph.add("FlowCacheLoadState", state_name=name)
    graph.add("SaveLatent", samples=(extend(graph, state=(state, 0)), 0), filename_prefix="s")
    with pytest.raises(Refused, match="state_name"):
        server.run(graph)


def test_a_file_stays_in_the_output_folder(server):
    graph = Graph()
    save = graph.add("FlowCacheSaveState", state=(extend(graph, seed=80), 1), filename_prefix="../../out")
    assert "output folder" in fails(server, graph, save)


def test_the_saved_file_is_a_state_of_the_core(server):
    name, _ = saved(server, "core")
    assert load_state(server.base / "output" / "flowcache_states" / name).frames == 4
