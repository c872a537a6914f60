"""Beside other nodes that patch a model: they work together, or one line says what cannot be combined."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.host.graph import Graph, fails, native, random_network, sample, write_network
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    ends = {"A": (4, 96), "B": (96, 4)}
    save_file(
        {name.format(end): torch.randn(*size, generator=draw) for end, size in ends.items()},
        loras / "beside.safetensors",
    )


def loaded(graph: Graph) -> tuple:
    return graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0


def flowcache(graph: Graph, model: tuple, preset: str = "off") -> tuple:
    return graph.add("FlowCache", model=model, preset=preset, history_budget=0), 0


def easycache(graph: Graph, model: tuple) -> tuple:
    return graph.add(
        "EasyCache", model=model, reuse_threshold=0.2, start_percent=0.0, end_percent=1.0, verbose=False
    ), 0


def lazycache(graph: Graph, model: tuple) -> tuple:
    return graph.add(
        "LazyCache", model=model, reuse_threshold=0.2, start_percent=0.0, end_percent=1.0, verbose=False
    ), 0


def context_windows(graph: Graph, model: tuple) -> tuple:
    settings = dict(
        context_length=16, context_overlap=4, context_schedule="standard_static", context_stride=1, closed_loop=False,
        fuse_method="pyramid", dim=2, freenoise=False, cond_retain_index_list="", split_conds_to_windows=False,
        latent_retain_index_list="", causal_window_fix=True,
    )  # fmt: skip
    return graph.add("ContextWindowsManual", model=model, **settings), 0


def lora(graph: Graph, model: tuple) -> tuple:
    return graph.add("LoraLoaderModelOnly", model=model, lora_name="beside.safetensors", strength_model=1.0), 0


def compiled(graph: Graph, model: tuple) -> tuple:
    return graph.add("TorchCompileModel", model=model, backend="inductor"), 0


@pytest.mark.parametrize(
    "other, words", [(easycache, "EasyCache"), (lazycache, "LazyCache"), (context_windows, "context")]
)
@pytest.mark.parametrize("first", [True, False])
def test_what_would_mix_up_the_chunks_is_refused(server, other, words, first):
    for sampled in (native, lambda graph, model: extend(graph, model=model)):
        graph = Graph()
        model = (
            flowcache(graph, other(graph, loaded(graph))) if first else other(graph, flowcache(graph, loaded(graph)))
        )
        assert words in fails(server, graph, sampled(graph, model))


def test_lora_goes_with_it(server):
    plain, alone, both = Graph(), Graph(), Graph()
    unpatched = sample(server, plain, native(plain, loaded(plain)))
    expected = sample(server, alone, native(alone, lora(alone, loaded(alone))))
    ours = sample(server, both, native(both, flowcache(both, lora(both, loaded(both)))))
    assert (ours - expected).norm() / expected.norm() < 1e-4
    assert (unpatched - expected).norm() / expected.norm() > 1e-2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_give_the_same_video(server):
    plain, graph = Graph(), Graph()
    expected = sample(server, plain, extend(plain, model=flowcache(plain, loaded(plain))))
    node = extend(graph, model=flowcache(graph, compiled(graph, loaded(graph))))
    report = graph.add("FlowCacheReport", report=(node, 2))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="compiled")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert "blocks are compiled (inductor)" in outcome.outputs[report]["text"][0]
    (file,) = server.saved(outcome, save)
    ours = load_file(file)["latent_tensor"]
    assert (ours - expected).norm() / expected.norm() < 1e-4
