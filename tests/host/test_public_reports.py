"""Kinds of public reports about caches, samplers and video packs, beside those with a file of their own.

docs/reports.md says where each is from.
"""

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.host.graph import SMALL, Graph, random_network, sample, write_network
from tests.helpers.host.videos import frames_of
from tests.host.test_extend import extend
from tests.host.test_model_patches import off

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def files(server):
    folder = server.base / "models" / "diffusion_models"
    write_network(folder / "reported.safetensors", random_network(), causal_ar=None)
    write_network(folder / "extend.safetensors", random_network())
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    draw, name = torch.Generator().manual_seed(1), "diffusion_model.blocks.{}.self_attn.q.lora_{}.weight"
    sizes = {"A": (4, 96), "B": (96, 4)}
    lora = {
        name.format(layer, end): torch.randn(*size, generator=draw) for layer in range(3) for end, size in sizes.items()
    }
    save_file(lora, server.base / "models" / "loras" / "reported.safetensors")


def loaded(graph: Graph) -> tuple:
    return graph.add("UNETLoader", unet_name="reported.safetensors", weight_dtype="default"), 0


def prompt(graph: Graph, words: str) -> tuple:
    return graph.add("FlowCacheDemoPrompt", caption=words), 0


def long_prompt(graph: Graph, seed: int) -> tuple:
    """256 tokens of the network's width."""
    return graph.add("TestCaption", seed=seed, tokens=256, width=SMALL.text_dim), 0


def guided(graph: Graph, model: tuple, positive: tuple, negative: tuple) -> tuple:
    return graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0), 0


def two_lengths(graph: Graph, model: tuple) -> tuple:
    return guided(graph, model, prompt(graph, "a red circle"), long_prompt(graph, 1))


def more_than_the_encoder_gives(graph: Graph, model: tuple) -> tuple:
    whole = long_prompt(graph, 1)
    for seed in (2, 3):
        whole = graph.add("ConditioningConcat", conditioning_to=whole, conditioning_from=long_prompt(graph, seed)), 0
    return guided(graph, model, whole, prompt(graph, ""))


def several_prompts(graph: Graph, model: tuple) -> tuple:
    both = graph.add(
        "ConditioningCombine",
        conditioning_1=prompt(graph, "a red circle"),
        conditioning_2=prompt(graph, "a blue square"),
    )
    return guided(graph, model, (both, 0), prompt(graph, ""))


def prompts_for_some_steps(graph: Graph, model: tuple) -> tuple:
    early = graph.add("ConditioningSetTimestepRange", conditioning=prompt(graph, "a red circle"), start=0.0, end=0.3)
    late = graph.add("ConditioningSetTimestepRange", conditioning=prompt(graph, "a blue square"), start=0.3, end=1.0)
    both = graph.add("ConditioningCombine", conditioning_1=(early, 0), conditioning_2=(late, 0))
    return guided(graph, model, (both, 0), prompt(graph, ""))


def three_branches(graph: Graph, model: tuple) -> tuple:
    return graph.add(
        "DualCFGGuider", model=model, cond1=prompt(graph, "a red circle"), cond2=prompt(graph, "a blue square"),
        negative=prompt(graph, ""), cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular",
    ), 0  # fmt: skip


def no_negative(graph: Graph, model: tuple) -> tuple:
    return graph.add("BasicGuider", model=model, conditioning=prompt(graph, "a red circle")), 0


def scheduled_lora(graph: Graph, model: tuple) -> tuple:
    """By hooks, on the positive prompt alone, stronger at first."""
    hook = graph.add("CreateHookLoraModelOnly", lora_name="reported.safetensors", strength_model=1.0), 0
    frames = None
    for strength, start in ((1.0, 0.0), (0.2, 0.5)):
        more = {} if frames is None else {"prev_hook_kf": frames}
        frames = graph.add("CreateHookKeyframe", strength_mult=strength, start_percent=start, **more), 0
    hook = graph.add("SetHookKeyframes", hooks=hook, hook_kf=frames), 0
    positive = graph.add(
        "ConditioningSetProperties", cond_NEW=prompt(graph, "a red circle"), hooks=hook, strength=1.0,
        set_cond_area="default",
    )  # fmt: skip
    return guided(graph, model, (positive, 0), prompt(graph, ""))


GUIDERS = [
    two_lengths, more_than_the_encoder_gives, several_prompts, prompts_for_some_steps, three_branches, no_negative,
    scheduled_lora,
]  # fmt: skip


def video(graph: Graph, guider=no_negative, ours: bool = True, width: int = 64, frames: int = 3) -> str:
    model = loaded(graph)
    settings = dict(frames_per_chunk=3, lag=STEPS, solver="euler")
    kind = ("FlowCacheARSampler", settings) if ours else ("KSamplerSelect", dict(sampler_name="euler"))
    return graph.add(
        "SamplerCustomAdvanced",
        noise=(graph.add("RandomNoise", noise_seed=5), 0),
        guider=guider(graph, model),
        sampler=(graph.add(kind[0], **kind[1]), 0),
        sigmas=(graph.add("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0), 0),
        latent_image=(graph.add("EmptyARVideoLatent", width=width, height=48, length=4 * frames - 3, batch_size=1), 0),
    )


@pytest.mark.parametrize("guider", GUIDERS)
def test_guidance_of_every_kind_is_the_hosts(server, guider):
    host, mine = Graph(), Graph()
    expected = sample(server, host, video(host, guider, ours=False))
    assert off(sample(server, mine, video(mine, guider)), expected) < 1e-5


@pytest.mark.parametrize("width, frames", [(72, 3), (104, 3), (1040, 1), (64, 1), (64, 2)])
def test_odd_sizes_and_very_short_videos(server, width, frames):
    """Latents of odd width, which are padded, and videos shorter than a chunk."""
    host, mine = Graph(), Graph()
    expected = sample(server, host, video(host, ours=False, width=width, frames=frames))
    assert off(sample(server, mine, video(mine, width=width, frames=frames)), expected) < 1e-5


@pytest.mark.parametrize("policy", ["flowcache", "teacache"])
def test_nothing_of_a_run_is_left_for_the_next(server, policy):
    """One patched model, runs of other sizes, lengths, batches and seeds one after another and in one graph; and as
    much reuse with another seed."""

    def patched(graph: Graph) -> tuple:
        model = graph.add("UNETLoader", unet_name="extend.safetensors", weight_dtype="default"), 0
        return graph.add(
            "FlowCache", model=model, preset="custom", history_budget=0, policy=policy, threshold=3.0, every=2
        ), 0

    def run(*cases: dict) -> tuple[list[torch.Tensor], list[str]]:
        graph = Graph()
        model = patched(graph)
        nodes = [extend(graph, model=model, steps=12, lag=12, **case) for case in cases]
        saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="s") for node in nodes]
        reports = [graph.add("FlowCacheReport", report=(node, 2)) for node in nodes]
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        made = [load_file(server.saved(outcome, save)[0])["latent_tensor"] for save in saves]
        return made, [outcome.outputs[report]["text"][0] for report in reports]

    cases = [dict(seed=1), dict(seed=2, width=96), dict(seed=3, chunks=4), dict(seed=4, guidance=3.0), dict(seed=5)]
    alone = [run(case) for case in cases]
    together, told = run(*cases)
    for (single,), both in zip((made for made, _ in alone), together, strict=True):
        assert torch.equal(single, both)
    reused = [int(text.split("% of steps reused")[0].split()[-1]) for text in told]
    assert all(reused) and abs(reused[0] - reused[-1]) <= 20, reused


def test_branches_that_come_and_go_under_the_published_rule(server):
    """It holds a residual for each branch; a prompt that holds for some steps alone has none at first."""
    write_network(
        server.base / "models" / "diffusion_models" / "skyreels.safetensors", random_network(2, SMALL), causal_ar=None
    )
    results = []
    for preset in ("off", "paper fast"):
        graph = Graph()
        model = graph.add("UNETLoader", unet_name="skyreels.safetensors", weight_dtype="default"), 0
        model = graph.add("FlowCache", model=model, preset=preset, history_budget=0, family="skyreels"), 0
        early = graph.add(
            "ConditioningSetTimestepRange", conditioning=prompt(graph, "a red circle"), start=0.0, end=0.6
        )
        both = graph.add(
            "ConditioningCombine", conditioning_1=prompt(graph, "a blue square"), conditioning_2=(early, 0)
        )
        node = extend(graph, model=model, steps=20, lag=5, guidance=3.0)
        graph[node]["inputs"]["positive"] = [both, 0]
        results.append(sample(server, graph, node))
    assert all(torch.isfinite(one).all() for one in results) and off(*results) < 0.5


@pytest.mark.parametrize("fps", [23.976, 29.97, 12.5])
def test_frame_rates_that_are_no_whole_numbers(server, fps):
    """No frame is lost, and the file lasts as long as it should; pictures with an alpha channel too."""
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    stream = graph.add("FlowCacheStreamVideo", vae=vae, filename_prefix="rate/v", fps=fps), 0
    node = extend(graph, stream=stream, seed=30)
    image = graph.add("EmptyImage", width=64, height=64, batch_size=11, color=0xFF8000), 0
    mask = graph.add("SolidMask", value=0.5, width=64, height=64), 0
    alpha = graph.add("JoinImageWithAlpha", image=image, alpha=mask), 0
    save = graph.add("FlowCacheSaveVideo", images=alpha, report=(node, 2), filename_prefix="rate/s", fps=fps)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    for made, frames in ((node, 13), (save, 11)):
        (file,) = server.saved(outcome, made)
        assert len(frames_of(file)) == frames
        with av.open(str(file)) as opened:
            told = opened.streams.video[0]
            assert float(told.average_rate) == pytest.approx(fps, rel=1e-4)
            assert float(told.duration * told.time_base) == pytest.approx(frames / fps, rel=1e-3)
    inputs = server.get("/object_info")["FlowCacheStreamVideo"]["input"]["required"]["fps"][1]
    assert inputs["round"] == 0.001, "the page would round it to a whole number"


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_tiled_decoding_of_short_videos(server, frames):
    """Shorter than a tile in time, by the host's own node; as it is decoded whole but for the tiles' edges."""
    graph = Graph()
    node, vae = video(graph, frames=frames), (graph.add("FlowCacheLoadDemoVAE"), 0)
    tiles = dict(tile_size=64, overlap=0, temporal_size=8, temporal_overlap=4)
    whole = graph.add("VAEDecode", samples=(node, 0), vae=vae)
    tiled = graph.add("VAEDecodeTiled", samples=(node, 0), vae=vae, **tiles)
    compared = graph.add("FlowCacheCompareVideos", first=(whole, 0), second=(tiled, 0), view="wipe")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (text,) = outcome.outputs[compared]["text"]
    assert "equal" in text or float(text.split("PSNR ")[1].split(" dB")[0]) > 20
    assert f"{4 * frames - 3} frames" in text
