"""MAGI-1 through the nodes equals its engine alone; its VAE and text encoder in the host."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowcache_core.models.families import family_preset
from flowcache_core.models.magi.forward import PUBLISHED_FLOWCACHE, MagiSampling, magi_engine, magi_schedule
from flowcache_core.models.magi.fp8 import Fp8Linear
from flowcache_core.models.magi.network import MagiBackbone
from flowcache_core.models.magi.text import caption_text, null_text
from flowcache_core.models.magi.vae import LATENT_SCALE
from flowcache_core.settings import HistorySettings
from flowcache_core.solvers.one_step import chunk_noise
from tests.helpers.host.graph import Graph, fails, sample
from tests.helpers.host.magi_models import CONFIGS, network_of, tokens, vae_alone, write_network, write_vae
from tests.helpers.host.videos import check_video
from tests.helpers.host.videos import frames_of as frames_in
from tests.helpers.magi_weights import normal
from tests.host.test_long import interrupt, resumed
from tests.host.test_workflows import prompt_of, saved

FAMILY = {"base": "magi", "distilled": "magi distilled", "fp8": "auto"}
FRAMES, STEPS = 6, 8


@pytest.fixture(scope="module", autouse=True)
def files(server):
    models = server.base / "models"
    for name in CONFIGS:
        write_network(name, models / "diffusion_models" / f"magi_{name}")
    write_vae(models / "vae" / "magi")


def load(graph: Graph, name: str = "base", **inputs) -> tuple:
    settings = {"family": FAMILY[name], "weight_type": "default"} | inputs
    return graph.add("FlowCacheLoadARVideoModel", model_name=f"magi_{name}/model.safetensors", **settings), 0


def extend(graph: Graph, model: tuple, caption: int = 0, **inputs) -> str:
    positive = graph.add("TestCaption", seed=caption, tokens=9, width=4096)
    negative = graph.add("TestCaption", seed=100, tokens=1, width=4096)
    settings = dict(
        positive=(positive, 0), negative=(negative, 0), seed=4, chunks=3, steps=STEPS, guidance=0.0,
        frames_per_chunk=0,
        lag=-1, width=48, height=32,
    )  # fmt: skip
    return graph.add("FlowCacheAutoregressiveExtend", model=model, **settings | inputs)


def alone(
    name: str = "base", preset: str = "off", chunks: int = 3, given: torch.Tensor | None = None, network=None
) -> torch.Tensor:
    """The new chunks by the engine, in the host's space."""
    network, frames = network or network_of(name), 0 if given is None else given.shape[2]
    schedule = magi_schedule(chunks * FRAMES - frames % FRAMES, STEPS, frames)
    embedding = torch.randn(1, 256, 4096, generator=torch.Generator().manual_seed(0))
    mask, special = (torch.arange(256) < 9)[None], tokens()
    settings = family_preset(preset, "magi", 0, HistorySettings())
    engine = magi_engine(
        MagiBackbone(network),
        schedule,
        settings,
        lambda chunk: caption_text(embedding, mask, special, schedule.total_chunks - 1 - chunk),
        null_text(network.y_embedder.null_caption_embedding),
        lambda chunk: chunk_noise(4, chunk, (1, 16, FRAMES, 4, 6)),
        shape=(1, 16, FRAMES, 4, 6),
        device=torch.device("cpu"),
        sampling=MagiSampling() if settings.clean_pass else PUBLISHED_FLOWCACHE,
        given=None if given is None else given * LATENT_SCALE,
    )
    return torch.cat([chunk.latent for chunk in engine.run()], dim=2) / LATENT_SCALE


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "preset"),
    [("base", "off"), ("base", "balanced"), ("distilled", "off"), ("distilled", "paper fast"), ("fp8", "off")],
)
def test_nodes_equal_the_engine(server, name, preset):
    graph = Graph()
    patched = graph.add("FlowCache", model=load(graph, name), preset=preset, history_budget=0)
    ours = sample(server, graph, extend(graph, (patched, 0)))
    assert error(ours, alone(name, preset)) < (2e-2 if name == "fp8" else 1e-3)


def test_off_is_the_unpatched_model_to_the_bit(server):
    plain, off = Graph(), Graph()
    expected = sample(server, plain, extend(plain, load(plain)))
    patched = off.add("FlowCache", model=load(off), preset="off", history_budget=0)
    assert torch.equal(sample(server, off, extend(off, (patched, 0))), expected)


def test_what_other_nodes_hang_on_the_model(server):
    """Attention is the host's; all else is named, and so is a shift."""
    plain = Graph()
    expected = sample(server, plain, extend(plain, load(plain)))
    heeded = Graph()
    model = heeded.add("TestPatched", model=load(heeded), kind="attention")
    ours = sample(server, heeded, extend(heeded, (model, 0)))
    assert error(ours, expected) > 1e-2
    graph = Graph()
    model = load(graph)
    for kind in ("no place", "model function", "object patch"):
        model = graph.add("TestPatched", model=model, kind=kind), 0
    model = graph.add("ModelSamplingSD3", model=model, shift=9.0), 0
    node = extend(graph, model)
    report = graph.add("FlowCacheReport", report=(node, 2))
    assert torch.equal(sample(server, graph, node), expected)
    (text,) = server.run(graph).outputs[report]["text"]
    assert "itself: model_function_wrapper, patches, patches_replace, diffusion_model.of_a_test" in text
    assert "ModelSamplingSD3 and its kin have no effect on MAGI-1" in text


def write_latent(server, name: str, frames: int, channels: int = 16) -> torch.Tensor:
    latent = normal(name, (1, channels, frames, 4, 6)) / LATENT_SCALE
    version = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": latent, **version}, server.base / "input" / f"{name}.latent")
    return latent


@pytest.mark.parametrize("frames", [1, 14])
def test_a_prefix_of_any_length_is_kept_and_continued(server, frames):
    given = write_latent(server, f"magi{frames}", frames)
    graph = Graph()
    prefix = graph.add("LoadLatent", latent=f"magi{frames}.latent")
    ours = sample(server, graph, extend(graph, load(graph), prefix=(prefix, 0)))
    assert torch.allclose(ours[:, :, :frames], given, atol=1e-4)
    expected = alone(given=given)[:, :, frames % FRAMES :]
    assert error(ours[:, :, frames:], expected) < 1e-3 and ours.shape[2] == (frames // FRAMES + 3) * FRAMES


def test_going_on_from_a_state_equals_going_on_from_its_frames(server):
    graph = Graph()
    begun = extend(graph, load(graph))
    start = sample(server, graph, begun)
    results = []
    for given in ({"state": (begun, 1)}, {"prefix": (begun, 0)}):
        again = Graph(graph)
        results.append(sample(server, again, extend(again, ("1", 0), caption=1, chunks=2, seed=9, **given)))
    assert torch.equal(results[0][:, :, :18], start) and results[0].shape[2] == 5 * FRAMES
    assert error(*results) < 1e-4
    other = Graph(graph)
    assert (
        error(sample(server, other, extend(other, ("1", 0), caption=2, chunks=2, seed=9, state=(begun, 1))), results[0])
        > 1e-3
    )


@pytest.mark.parametrize(("name", "limit"), [("base", 1e-3), ("fp8", 0.1)])
def test_a_lora_reaches_every_layer(server, name, limit):
    """Of every kind; a quantised matrix is changed in its own numbers and rounded again, by chance where they lie
    between two of fp8's."""
    network, lora = network_of(name), {}
    for layer, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or weight.ndim > 3:
            continue
        outputs, inputs = weight.shape[-2:]
        down, up = normal(f"{layer}.down", (2, inputs)), normal(f"{layer}.up", (outputs, 2))
        size = 0.3 / inputs**0.5
        lora |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": size * up}
        added = size * up @ down
        if isinstance(module, Fp8Linear):
            most = torch.finfo(torch.float8_e4m3fn).max
            changed = (weight.float() + added / module.factors).clamp(-most, most)
            module.weight = torch.nn.Parameter(changed.to(torch.float8_e4m3fn), requires_grad=False)
        else:
            weight.add_(added)
    kinds = {key.removeprefix("diffusion_model.").split(".lora")[0].split(".")[-1] for key in lora}
    assert {"q", "qx", "k", "v", "linear_kv_xattn", "linear_proj", "linear_fc1", "linear_fc2", "linear"} <= kinds
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(lora, server.base / "models" / "loras" / f"magi_{name}.safetensors")
    graph = Graph()
    lora_name = f"magi_{name}.safetensors"
    model = graph.add("LoraLoaderModelOnly", model=load(graph, name), lora_name=lora_name, strength_model=1.0)
    ours = sample(server, graph, extend(graph, (model, 0)))
    far = error(ours, alone(name))
    assert error(ours, alone(network=network)) < min(limit, far / 3), far


def test_progress_previews_and_report(server):
    graph = Graph()
    node = extend(graph, load(graph), seed=30)
    report = graph.add("FlowCacheReport", report=(node, 2))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    ticks = STEPS + 2 * STEPS // 4
    assert [value for value, most in outcome.progress if most == ticks] == list(range(1, ticks + 1))
    assert outcome.previews and "chunk 3 of 3" in [text for name, text in outcome.texts if name == node][-1]
    assert f"3 chunks of {STEPS} steps, lag {STEPS // 4}" in outcome.outputs[report]["text"][0]


def frames_of(server, graph: Graph, images: tuple) -> torch.Tensor:
    """Saved pictures [F, H, W, 3], 0 to 1."""
    save = graph.add("SaveImage", images=images, filename_prefix="magi")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in server.saved(outcome, save)]
    return torch.from_numpy(np.stack(pictures)).float() / 255


@pytest.mark.parametrize("decoder", ["VAEDecode", "VAEDecodeTiled"])
def test_decoding(server, decoder):
    latent = write_latent(server, "decode", 5)
    graph = Graph()
    loaded = graph.add("LoadLatent", latent="decode.latent")
    vae = graph.add("FlowCacheLoadMagiVAE", vae_name="magi/diffusion_pytorch_model.safetensors")
    tiles = (
        {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
        if decoder == "VAEDecodeTiled"
        else {}
    )
    ours = frames_of(server, graph, (graph.add(decoder, samples=(loaded, 0), vae=(vae, 0), **tiles), 0))
    expected = (vae_alone().decode(latent)[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    assert ours.shape == expected.shape == (20, 32, 48, 3)
    assert (ours - expected).abs().max() < 2 / 255 and expected.std() > 0.1


@pytest.mark.parametrize(("pictures", "frames"), [(1, 1), (27, 6)])
@pytest.mark.parametrize("encoder", ["VAEEncode", "VAEEncodeTiled"])
def test_encoding(server, encoder, pictures, frames):
    graph = Graph()
    image = graph.add("EmptyImage", width=48, height=32, batch_size=pictures, color=0x4080C0)
    vae = graph.add("FlowCacheLoadMagiVAE", vae_name="magi/diffusion_pytorch_model.safetensors")
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8} if "Tiled" in encoder else {}
    ours = sample(server, graph, graph.add(encoder, pixels=(image, 0), vae=(vae, 0), **tiles))
    pixels = torch.tensor([0x40, 0x80, 0xC0]).view(1, 3, 1, 1, 1).expand(1, 3, max(1, pictures // 4 * 4), 32, 48) / 255
    assert error(ours, vae_alone().encode(pixels * 2 - 1)) < 1e-4 and ours.shape[2] == frames


def test_prompts_through_t5(server):
    """Upper case and markup do not matter, words do, and the text encoder's own mask reaches the network."""

    def latent(text: str, **tokens) -> torch.Tensor:
        graph = Graph()
        clip = graph.add("TestSmallT5")
        words = [graph.add("FlowCacheMagiPrompt", clip=(clip, 0), text=each, **tokens) for each in (text, "")]
        node = extend(graph, load(graph), positive=(words[0], 0), negative=(words[1], 0), chunks=1)
        return sample(server, graph, node)

    plain = latent("a good boy")
    assert torch.equal(latent("A <b>GOOD</b> Boy "), plain)
    assert error(latent("a bad cat"), plain) > 1e-3
    assert error(latent("a good boy", high_quality=False), plain) > 1e-3
    assert error(latent("a good boy", style="2d"), plain) > 1e-3


def test_text_image_and_video_to_a_saved_video(server):
    """All of it: prompts, picture and video as beginnings, three prompts one after another, decoded and saved."""
    graph = Graph()
    model = (graph.add("FlowCache", model=load(graph, "distilled"), preset="paper slow", history_budget=5), 0)
    vae = (graph.add("FlowCacheLoadMagiVAE", vae_name="magi/diffusion_pytorch_model.safetensors"), 0)
    image = graph.add("EmptyImage", width=48, height=48, batch_size=1, color=0x4080C0)
    start = graph.add("VAEEncode", pixels=(image, 0), vae=vae)
    node = extend(graph, model, chunks=1, prefix=(start, 0))
    for caption in (1, 2):
        node = extend(graph, model, caption=caption, chunks=1, state=(node, 1))
    decoded = graph.add("VAEDecode", samples=(node, 0), vae=vae)
    first = graph.add("VAEEncode", pixels=(decoded, 0), vae=vae)
    node = extend(graph, model, chunks=1, prefix=(first, 0))
    decoded = graph.add("VAEDecode", samples=(node, 0), vae=vae)
    video = graph.add("CreateVideo", images=(decoded, 0), fps=24.0)
    save = graph.add("SaveVideo", video=(video, 0), filename_prefix="magi", format="auto", codec="auto")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    check_video(server.saved(outcome, save)[0], 4 * 24, 48)


def test_chunks_are_streamed_to_disk(server):
    graph = Graph()
    vae = graph.add("FlowCacheLoadMagiVAE", vae_name="magi/diffusion_pytorch_model.safetensors")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="magi/v", fps=24.0, keep_latents=False)
    write_latent(server, "streamed", 14)
    prefix = graph.add("LoadLatent", latent="streamed.latent")
    node = extend(graph, load(graph), chunks=2, prefix=(prefix, 0), stream=(stream, 0))
    last = sample(server, graph, node)
    whole = Graph()
    prefix = whole.add("LoadLatent", latent="streamed.latent")
    expected = sample(server, whole, extend(whole, load(whole), chunks=2, prefix=(prefix, 0)))
    assert torch.equal(last, expected[:, :, -FRAMES:])
    (video,) = (server.base / "output" / "magi").glob("v_*.mp4")
    assert len(frames_in(video)) == 4 * expected.shape[2]
    graph[stream]["inputs"] |= {"keep_latents": True, "filename_prefix": "magi/kept"}
    report = graph.add("FlowCacheReport", report=(node, 2))
    assert "written anew" not in server.run(graph).outputs[report]["text"][0]
    graph[stream]["inputs"]["filename_prefix"] = "magi/again"
    assert "the video alone was written anew" in server.run(graph).outputs[report]["text"][0]
    (again,) = (server.base / "output" / "magi").glob("again_*.mp4")
    assert np.array_equal(frames_in(again), frames_in(video))


def test_prompts_over_time(server):
    """Each chunk has its own; where the text stays the same, so does the video."""

    def latent(text: str) -> torch.Tensor:
        graph = Graph()
        clip = graph.add("TestSmallT5")
        words = graph.add("FlowCachePromptsOverTime", clip=(clip, 0), text=text)
        return sample(server, graph, extend(graph, load(graph), positive=(words, 0), chunks=2))

    same, changed = latent("0-: a good boy"), latent("0: a good boy\n1-: a bad cat")
    assert torch.equal(same[:, :, :FRAMES], changed[:, :, :FRAMES])
    assert error(changed[:, :, FRAMES:], same[:, :, FRAMES:]) > 1e-3


def test_interrupt(server):
    graph = Graph()
    node = extend(graph, load(graph), chunks=2000, seed=41)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    threading.Thread(target=lambda: (time.sleep(3), server.post("/interrupt", {}))).start()
    assert server.run(graph).interrupted
    after = Graph()
    assert error(sample(server, after, extend(after, load(after))), alone()) < 1e-3


@pytest.mark.parametrize("name", ["base", "distilled"])
def test_an_interrupted_run_goes_on(server, name):
    """From a picture, so that the first chunk begins with a frame that is given."""
    write_latent(server, "resumed", 1)

    def graph_of(**inputs) -> tuple[Graph, str]:
        graph = Graph()
        inputs = {each: (graph.add(node, **settings), 0) for each, (node, settings) in inputs.items()}
        prefix = graph.add("LoadLatent", latent="resumed.latent")
        node = extend(graph, load(graph, name), chunks=8, seed=43, prefix=(prefix, 0), **inputs)
        graph.add("FlowCacheReport", report=(node, 2))
        return graph, node

    plain = sample(server, *graph_of())
    graph, node = graph_of(resume=("FlowCacheResume", {"limit_gb": 1.0}))
    interrupt(server, graph)
    found, ready = resumed(server, graph, node)
    assert 3 <= ready < 8 and found.shape == plain.shape == (1, 16, 8 * FRAMES, 4, 6)
    assert torch.equal(found[:, :, : ready * FRAMES], plain[:, :, : ready * FRAMES])
    begun, expected = (latent[:, :, ready * FRAMES :] for latent in (found, plain))
    assert torch.isfinite(begun).all()
    assert error(begun, expected) < 0.3  # begun anew, with the same noise; with another it is 1.1


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"frames_per_chunk": 5}, "frames_per_chunk is 5, and MAGI-1 knows only 0 or 6"),
        ({"lag": 5}, "lag is 5"),
        ({"steps": 7}, "multiple of 4"),
        ({"solver": "unipc"}, "solver is unipc"),
        ({"attention": "joint"}, "attention is joint"),
        ({"width": 40, "height": 24}, "that is of 16 pixels"),
    ],
)
def test_settings_that_magi_does_not_have(server, inputs, words):
    graph = Graph()
    assert words in fails(server, graph, extend(graph, load(graph), **inputs))


def test_wrong_captions_latents_and_samplers(server):
    def message(build) -> str:
        graph = Graph()
        return fails(server, graph, build(graph))

    def narrow(graph):
        caption = graph.add("TestCaption", seed=0, tokens=9, width=2048)
        return extend(graph, load(graph), positive=(caption, 0))

    def negative(graph):
        prompt = graph.add("FlowCacheMagiPrompt", clip=(graph.add("TestSmallT5"), 0), text="ugly")
        return extend(graph, load(graph), negative=(prompt, 0))

    def guided(graph):
        return extend(graph, load(graph, "distilled"), guidance=3.0)

    def channels(graph):
        write_latent(server, "four", 6, channels=4)
        return extend(graph, load(graph), prefix=(graph.add("LoadLatent", latent="four.latent"), 0))

    def others_state(graph):
        return extend(graph, load(graph), state=(extend(graph, load(graph, "distilled")), 1))

    def stock_sampler(graph):
        caption = (graph.add("TestCaption", seed=0, tokens=9, width=4096), 0)
        latent = graph.add("EmptyHunyuanLatentVideo", width=48, height=32, length=21, batch_size=1)
        return graph.add(
            "KSampler", model=load(graph), seed=0, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple",
            positive=caption, negative=caption, latent_image=(latent, 0), denoise=1.0,
        )  # fmt: skip

    def calibrated(graph):
        return graph.add("FlowCacheCalibrate", **others(graph), chunks=1, minutes=0.0)

    def in_windows(graph):
        sizes = dict(frames=21, window=21, overlap=5, width=48, height=32)
        node = graph.add("FlowCacheExtendInWindows", **others(graph), **sizes)
        graph.add("SaveImage", images=(node, 0), filename_prefix="s")
        return node

    def others(graph) -> dict:
        caption = (graph.add("TestCaption", seed=0, tokens=9, width=4096), 0)
        vae = (graph.add("FlowCacheLoadMagiVAE", vae_name="magi/diffusion_pytorch_model.safetensors"), 0)
        return dict(model=load(graph), positive=caption, negative=caption, vae=vae, seed=0)

    assert "is [1, 256, 2048], expected [1, tokens, 4096]" in message(narrow)
    assert "takes none; leave that MAGI-1 Prompt empty" in message(negative)
    assert "a distilled MAGI-1 takes none" in message(guided)
    assert "expected [batch, 16, frames" in message(channels)
    assert "another model" in message(others_state)
    assert "use Autoregressive Extend" in message(stock_sampler)
    for node in (calibrated, in_windows):
        assert "MAGI-1 is run by Autoregressive Extend" in message(node)


def test_a_vae_that_is_none(server):
    save_file({"encoder.cls_token": torch.zeros(1)}, server.base / "models" / "vae" / "other.safetensors")
    graph = Graph()
    node = graph.add("FlowCacheLoadMagiVAE", vae_name="other.safetensors")
    graph.add("VAEDecode", samples=(extend(graph, load(graph)), 0), vae=(node, 0))
    graph.add("SaveImage", images=(str(len(graph)), 0), filename_prefix="s")
    assert "Nothing says the sizes of other.safetensors" in fails(server, graph, node)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("magi_text_to_video", 6),
        ("magi_24b_text_to_video", 6),
        ("magi_image_to_video", 6),
        ("magi_continue_three_prompts", 4 * 6),
    ],  # fmt: skip
)
def test_workflows_run_to_a_video(server, name, frames):
    prompt = prompt_of(name)
    for node in prompt.values():
        if node["class_type"] == "CLIPLoader":
            node |= {"class_type": "TestSmallT5", "inputs": {}}
        elif node["class_type"] == "ImageScale":
            node["inputs"] |= {"width": 48, "height": 48}
        elif node["class_type"] == "FlowCacheAutoregressiveExtend":
            node["inputs"] |= {"steps": STEPS, "chunks": 1, "width": 48, "height": 48}
    outcome = server.run(prompt)
    assert outcome.error is None, outcome.error["exception_message"]
    check_video(saved(server, prompt, outcome, f"flowcache/{name}"), 4 * frames, 48)


def test_a_size_that_the_network_does_not_divide(server):
    """It takes 2 x 2 of the latent's pixels at once."""
    graph = Graph()
    node = extend(graph, load(graph), chunks=1, width=56, height=32)
    assert "MAGI-1 needs multiples of 2, that is of 16 pixels" in fails(server, graph, node)
