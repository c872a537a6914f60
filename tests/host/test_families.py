"""Each family through the nodes equals the engine alone on the same weights, noise and caption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core import generate
from flowcache_core.checkpoints import STAMP
from flowcache_core.demo.captions import embed_caption
from flowcache_core.models.families import FAMILIES, SOLVERS, family_preset
from flowcache_core.models.wan import WanConfig, WanNetwork
from flowcache_core.settings import OFF, HistorySettings
from tests.helpers.gguf_files import write_gguf
from tests.helpers.host.graph import SMALL, Graph, fails, random_network, sample, write_network

UNTOLD = json.dumps({"transformer": {"num_heads": SMALL.num_heads, "text_dim": SMALL.text_dim}})
CONFIGS = {"causal": SMALL, "skyreels": replace(SMALL, fps=True), "rolling": SMALL, "wan": SMALL}


def extend(graph: Graph, family: str, preset: str, guidance: float, **inputs) -> str:
    model = graph.add(
        "FlowCacheLoadARVideoModel", model_name=f"{family}.safetensors", family=family, weight_type="fp32"
    )
    patched = graph.add("FlowCache", model=(model, 0), preset=preset, history_budget=0)
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    settings = dict(
        seed=4, chunks=3, steps=20 if family == "skyreels" else 4, frames_per_chunk=2, lag=4, width=64, height=64
    )
    return graph.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(words[0], 0), negative=(words[1], 0),
        guidance=guidance, **settings | inputs,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def files(server):
    for family, config in CONFIGS.items():
        folder = server.base / "models" / "diffusion_models"
        write_network(folder / f"{family}.safetensors", random_network(2, config), config)


def network_of(family: str):
    network = WanNetwork(CONFIGS[family])
    network.load_state_dict(random_network(2, CONFIGS[family]))
    return FAMILIES[family].backbone(
        network.eval().requires_grad_(False), 24, torch.nn.functional.scaled_dot_product_attention
    )


def alone(
    family: str, preset: str, guidance: float, prefix: torch.Tensor | None = None, end: torch.Tensor | None = None
):
    usual, config = FAMILIES[family], CONFIGS[family]
    steps = 20 if family == "skyreels" else 4
    return generate(
        network_of(family), embed_caption("a red circle"), 3, steps=steps, lag=4, frames_per_chunk=2, seed=4,
        settings=family_preset(preset, family, config.dim, HistorySettings()), guidance_scale=guidance,
        negative=embed_caption(""), sigmas=usual.levels(steps), solver=SOLVERS[usual.solver(steps)],
        prefix=prefix, end=end,
    )  # fmt: skip


def normalised(latent: torch.Tensor) -> torch.Tensor:
    """The host's latents as the network sees them."""
    from flowcache_core.models.latent_spaces import WAN_21_MEAN, WAN_21_STD

    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_21_MEAN, WAN_21_STD))
    return (latent - mean) / deviation


@pytest.mark.parametrize(
    "family, preset, guidance",
    [
        ("causal", "off", 1.0),
        ("skyreels", "off", 3.0),
        ("skyreels", "paper slow", 3.0),
        ("skyreels", "balanced", 3.0),
        ("wan", "off", 2.0),
    ],
)
def test_nodes_equal_the_engine(server, family, preset, guidance):
    graph = Graph()
    ours = normalised(sample(server, graph, extend(graph, family, preset, guidance)))
    expected = alone(family, preset, guidance)
    assert (ours - expected.latents).norm() / expected.latents.norm() < 2e-3


def test_a_file_that_cannot_tell_its_family_is_warned_about(server):
    """On the node, in the log and in the report, which stays; a family that was chosen is believed, wherever it was."""
    save_file(random_network(6), server.base / "models" / "diffusion_models" / "untold.safetensors", {"config": UNTOLD})
    for at_loader, at_extend in (("auto", "auto"), ("auto", "skyreels"), ("skyreels", "auto")):
        graph = Graph()
        node = extend(graph, at_loader, "off", 1.0, steps=2, lag=2, chunks=1)
        graph[node]["inputs"]["family"] = at_extend
        (model,) = (key for key, each in graph.items() if each["class_type"] == "FlowCacheLoadARVideoModel")
        graph[model]["inputs"]["model_name"] = "untold.safetensors"
        report = graph.add("FlowCacheReport", report=(node, 2))
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        line = "taken as plain Wan 2.1: choose its family"
        shown = any(line in text for key, text in outcome.texts if key == model)
        assert shown == (at_loader == "auto") or model not in outcome.executed  # the host has it from the run before
        assert (line in outcome.outputs[report]["text"][0]) == (at_loader == at_extend == "auto")
    assert "untold.safetensors has the Wan 2.1 layout and no stamp" in server.log.read_text()


def test_the_frame_rate_reaches_the_network(server):
    results = []
    for fps in (16, 24):
        graph = Graph()
        node = extend(graph, "skyreels", "off", 3.0)
        graph["1"]["inputs"]["fps"] = fps
        results.append(sample(server, graph, node))
    assert not torch.allclose(*results, atol=1e-3)


def joint_alone(family: str, steps: int, lag: int, chunks: int, guidance: float) -> torch.Tensor:
    usual = FAMILIES[family]
    return generate(
        network_of(family), embed_caption("a red circle"), chunks, family_name=family, steps=steps, lag=lag,
        frames_per_chunk=2, settings=OFF, seed=4, guidance_scale=guidance, negative=embed_caption(""),
        sigmas=usual.levels(steps), seeing="rolling" if family == "rolling" else "joint",
    ).latents  # fmt: skip


@pytest.mark.parametrize("lag", [0, 4])
def test_joint_attention_equals_the_engine(server, lag):
    """Synchronous and asynchronous, as SkyReels-V2 runs without acceleration."""
    graph = Graph()
    ours = normalised(sample(server, graph, extend(graph, "skyreels", "off", 3.0, attention="joint", lag=lag)))
    expected = joint_alone("skyreels", 20, lag, 3, 3.0)
    assert (ours - expected).norm() / expected.norm() < 2e-3
    graph = Graph()
    causal = normalised(sample(server, graph, extend(graph, "skyreels", "off", 3.0, lag=lag)))
    assert (causal - expected).norm() / expected.norm() > 1e-2


def test_rolling_forcing_equals_the_engine(server):
    graph = Graph()
    ours = normalised(sample(server, graph, extend(graph, "rolling", "off", 1.0, steps=5, lag=1, chunks=9)))
    expected = joint_alone("rolling", 5, 1, 9, 1.0)
    assert (ours - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("attention, lag", [("causal", 4), ("causal", 20), ("joint", 4)])
def test_a_start_and_an_end_image(server, attention, lag):
    graph = Graph()
    images = [
        graph.add("VAEEncode", pixels=(graph.add("EmptyImage", width=64, height=64, batch_size=1, color=color), 0),
                  vae=(graph.add("FlowCacheLoadDemoVAE"), 0))
        for color in (0xFF0000, 0x0000FF)
    ]  # fmt: skip
    node = extend(
        graph, "skyreels", "balanced", 3.0, attention=attention, lag=lag, prefix=(images[0], 0), end=(images[1], 0)
    )
    video = sample(server, graph, node)
    assert video.shape[2] == 1 + 6 + 1
    given = [sample(server, Graph(graph), image) for image in images]
    assert torch.allclose(video[:, :, :1], given[0], atol=1e-4) and torch.allclose(
        video[:, :, -1:], given[1], atol=1e-4
    )
    for name, image in (("prefix", images[1]), ("end", images[0])):
        other = Graph(graph)
        other[node] = {**graph[node], "inputs": graph[node]["inputs"] | {name: [image, 0]}}
        assert not torch.allclose(sample(server, other, node)[:, :, 1:-1], video[:, :, 1:-1], atol=1e-2)


def test_a_start_and_an_end_image_equal_the_engine(server):
    graph = Graph()
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
    latent = graph.add("VAEEncode", pixels=(image, 0), vae=(graph.add("FlowCacheLoadDemoVAE"), 0))
    given = normalised(sample(server, Graph(graph), latent))
    node = extend(graph, "skyreels", "paper slow", 3.0, prefix=(latent, 0), end=(latent, 0), condition_noise=0.0)
    expected = alone("skyreels", "paper slow", 3.0, prefix=given, end=given).latents
    assert (normalised(sample(server, graph, node)) - expected).norm() / expected.norm() < 2e-3


def test_what_joint_runs_cannot_do_is_said(server):
    graph = Graph()
    begun = extend(graph, "skyreels", "off", 3.0, attention="joint")
    node = extend(graph, "skyreels", "off", 3.0, state=(begun, 1))
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error["node_id"] == node and "keeps no history" in outcome.error["exception_message"]


@pytest.mark.parametrize("steps, forwards", [(1, 5 + 2 * 2), (2, 5 + 2 * 3), (3, 3 * 4), (4, 3 * 5)])
def test_few_step_models_take_their_steps(server, steps, forwards):
    """Causal-Forcing's 1- and 2-step models take 4 steps for the very first chunk; each chunk has a clean pass."""
    graph = Graph()
    node = extend(graph, "causal", "balanced", 1.0, steps=steps)
    report = graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert f"forwards: {forwards} of {forwards} " in outcome.outputs[report]["text"][0]


def test_windows_equal_a_chain_of_stock_nodes(server):
    """Upstream's long video: the end of a window is decoded, encoded again, and begins the next."""
    graph = Graph()
    vae = (graph.add("FlowCacheLoadDemoVAE"), 0)

    def encoded(images: str, first: int, count: int) -> str:
        part = graph.add("ImageFromBatch", image=(images, 0), batch_index=first, length=count)
        return graph.add("VAEEncode", pixels=(part, 0), vae=vae)

    together = dict(attention="joint", lag=0, chunks=1, steps=4, shift=8.0)
    first = extend(graph, "skyreels", "off", 3.0, **together, frames_per_chunk=7, seed=4)
    images = graph.add("VAEDecode", samples=(first, 0), vae=vae)
    prefix = (encoded(images, 16, 9), 0)
    second = extend(graph, "skyreels", "off", 3.0, **together, frames_per_chunk=4, seed=5, prefix=prefix)
    chained = encoded(graph.add("VAEDecode", samples=(second, 0), vae=vae), 9, 13)
    inputs = graph[first]["inputs"]
    whole = graph.add(
        "FlowCacheExtendInWindows", model=inputs["model"], vae=vae,
            positive=inputs["positive"], negative=inputs["negative"],
        seed=4, frames=41, window=25, overlap=9, width=64, height=64, steps=4, guidance=3.0,
    )  # fmt: skip
    node = encoded(whole, 25, 13)
    ours = sample(server, Graph(graph), node)
    assert ours.shape[2] == 4
    assert torch.allclose(ours, sample(server, Graph(graph), chained), atol=1e-4)


@pytest.mark.parametrize("family", ["causal", "rolling", "skyreels"])
def test_a_stock_loaded_model_runs_as_the_family_that_is_named(server, family):
    """ComfyUI's own loader tells no family; the nodes are told it instead, and do what our loader's model does,
    SkyReels-V2's frame-rate layers included."""
    folder = server.base / "models" / "diffusion_models"
    save_file(random_network(2, CONFIGS[family]), folder / f"untold {family}.safetensors", {"config": UNTOLD})

    def made(loader: str, named: dict, **loading) -> torch.Tensor:
        graph = Graph()
        model = graph.add(loader, **loading)
        patched = graph.add("FlowCache", model=(model, 0), preset="paper fast", history_budget=0, **named)
        words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
        return sample(server, graph, graph.add(
            "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(words[0], 0), negative=(words[1], 0),
            guidance=1.0, seed=4, chunks=2, steps=0 if family != "skyreels" else 10, frames_per_chunk=2, lag=-1,
            width=64, height=64,
        ))  # fmt: skip

    stock = dict(unet_name=f"untold {family}.safetensors", weight_dtype="default")
    ours = dict(model_name=f"untold {family}.safetensors", family=family, weight_type="default")
    expected = made("FlowCacheLoadARVideoModel", {}, **ours)
    assert torch.equal(made("UNETLoader", {"family": family}, **stock), expected)
    assert not torch.equal(made("UNETLoader", {}, **stock), expected)


@pytest.mark.parametrize("named_on", ["FlowCache", "Extend"])
def test_missing_frame_rate_layers_are_told(server, named_on):
    """A GGUF loader drops those of SkyReels-V2 1.3B and does not say which file it read; the published rule goes on."""
    wide = WanConfig(dim=1536, ffn_dim=64, num_heads=12, num_layers=1, text_dim=64)
    file = server.base / "models" / "diffusion_models" / "wide untold.safetensors"
    if not file.exists():
        weights = {name: weight.half() for name, weight in random_network(2, wide).items()}
        save_file(weights, file, {"config": json.dumps({"transformer": {"num_heads": 12, "text_dim": 64}})})
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="wide untold.safetensors", weight_dtype="default")
    model = graph.add("TestUntold", model=(model, 0))
    on_node = {"family": "skyreels"} if named_on == "FlowCache" else {}
    model = graph.add("FlowCache", model=(model, 0), preset="paper fast", history_budget=0, **on_node)
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    made = graph.add(
        "FlowCacheAutoregressiveExtend", model=(model, 0), positive=(words[0], 0), negative=(words[1], 0),
        guidance=1.0, seed=4, chunks=1, steps=8, frames_per_chunk=1, lag=-1, width=64, height=64,
        **({"family": "skyreels"} if named_on == "Extend" else {}),
    )  # fmt: skip
    report = graph.add("FlowCacheReport", report=(made, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    told = "SkyReels-V2 1.3B runs without its frame-rate layers"
    assert told in outcome.outputs[report]["text"][0]
    assert any(told in text for _, text in outcome.texts)


def test_a_gguf_file_keeps_its_frame_rate_layers(server, tmp_path):
    """They are read from the file that the loader's node names, as ComfyUI-GGUF passes them over."""
    gguf = pytest.importorskip("gguf", reason="no gguf package: make test installs it")
    (tmp_path / "gguf").symlink_to(Path(gguf.__file__).parent)
    weights = random_network(2, CONFIGS["skyreels"])
    folder = server.base / "models" / "diffusion_models"
    save_file(weights, folder / "whole untold.safetensors", {"config": UNTOLD})
    without = {name: weight for name, weight in weights.items() if not name.startswith("fps_")}
    save_file(without, folder / "without untold.safetensors", {"config": UNTOLD})
    write_gguf(folder / "small.gguf", weights)

    def made(loader: str, **loading) -> torch.Tensor:
        graph = Graph()
        model = graph.add(loader, **loading)
        model = graph.add("ModelSamplingSD3", model=(model, 0), shift=5.0)  # another node between
        patched = graph.add("FlowCache", model=(model, 0), preset="off", history_budget=0, family="skyreels")
        words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
        return sample(server, graph, graph.add(
            "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=(words[0], 0), negative=(words[1], 0),
            guidance=1.0, seed=4, chunks=1, steps=4, frames_per_chunk=1, lag=-1, width=64, height=64,
        ))  # fmt: skip

    expected = made("UNETLoader", unet_name="whole untold.safetensors", weight_dtype="default")
    named = dict(weights="without untold.safetensors", packages=str(tmp_path))
    assert torch.equal(made("TestGGUFLoader", unet_name="small.gguf", **named), expected)
    assert not torch.equal(made("TestGGUFLoader", unet_name="other.gguf", **named), expected)


def test_the_family_named_on_extend_alone(server):
    folder = server.base / "models" / "diffusion_models"
    save_file(random_network(2, SMALL), folder / "untold.safetensors", {"config": UNTOLD})

    def made(loader: str, named: dict, **loading) -> torch.Tensor:
        graph = Graph()
        model = graph.add(loader, **loading)
        words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
        settings = dict(seed=4, chunks=2, steps=0, guidance=0.0, frames_per_chunk=2, lag=-1, width=64, height=64)
        return sample(server, graph, graph.add(
            "FlowCacheAutoregressiveExtend", model=(model, 0), positive=(words[0], 0), negative=(words[1], 0),
            **settings, **named,
        ))  # fmt: skip

    expected = made(
        "FlowCacheLoadARVideoModel", {}, model_name="untold.safetensors", family="causvid", weight_type="default"
    )
    stock = dict(unet_name="untold.safetensors", weight_dtype="default")
    assert torch.equal(made("UNETLoader", {"family": "causvid"}, **stock), expected)


def test_a_family_that_the_network_cannot_be(server):
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="skyreels.safetensors", family="auto", weight_type="default"
    )
    patched = graph.add("FlowCache", model=(loaded, 0), preset="high", history_budget=0, family="causal")
    graph.add("PreviewAny", source=(patched, 0))
    assert "set to causal, and the model is skyreels by its file" in fails(server, graph, patched)


def test_one_of_two_networks_is_refused(server):
    """Alone it would run, and show noise."""
    path = server.base / "models" / "diffusion_models" / "high_noise.safetensors"
    save_file(random_network(1), path, {STAMP: json.dumps({"family": "experts"}), "config": UNTOLD})
    graph = Graph()
    model = graph.add("FlowCacheLoadARVideoModel", model_name=path.name, family="auto", weight_type="default")
    words = [graph.add("FlowCacheDemoPrompt", caption=caption) for caption in ("a red circle", "")]
    node = graph.add(
        "FlowCacheAutoregressiveExtend", model=(model, 0), positive=(words[0], 0), negative=(words[1], 0), seed=1,
        chunks=1, steps=0, guidance=0.0, frames_per_chunk=0, lag=-1, width=64, height=64,
    )  # fmt: skip
    assert "one of the two networks" in fails(server, graph, node)
