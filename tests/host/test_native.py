"""FlowCache on ComfyUI's own autoregressive path: stock loader, SamplerARVideo, SamplerCustomAdvanced."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.host.graph import Graph, native, random_network, sample, write_network
from tests.host.test_extend import extend

MODELS = ("models", "diffusion_models")


@pytest.fixture(scope="module")
def folder(server):
    path = server.base.joinpath(*MODELS)
    write_network(path / "small.safetensors", random_network())
    write_network(path / "small_bf16.safetensors", {k: v.bfloat16() for k, v in random_network().items()})
    return path


def load(graph: Graph, name: str = "small.safetensors", dtype: str = "default") -> tuple:
    return graph.add("UNETLoader", unet_name=name, weight_dtype=dtype), 0


def flowcache(graph: Graph, model: tuple, preset: str = "off", budget: int = 0, **more) -> tuple:
    return graph.add("FlowCache", model=model, preset=preset, history_budget=budget, **more), 0


def guider_calls(server) -> int:
    """Since the server began."""
    graph = Graph()
    node = graph.add("TestGuiderCalls")
    return int(server.run(graph).outputs[node]["text"][0])


def test_off_equals_the_plain_sampler(server, folder):
    """Up to rounding: our rotary angles are computed in float64, the host's in float32."""
    plain, patched = Graph(), Graph()
    expected = sample(server, plain, native(plain, load(plain)))
    ours = sample(server, patched, native(patched, flowcache(patched, load(patched))))
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert expected.std() > 0.1


def test_an_image_start_framewise_equals_the_plain_sampler(server, folder):
    results = []
    for patch in (False, True):
        graph = Graph()
        image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
        vae = (graph.add("FlowCacheLoadDemoVAE"), 0)
        start = dict(vae=vae, start_image=(image, 0), width=64, height=64, length=13, batch_size=1)
        model = (graph.add("ARVideoI2V", model=load(graph), **start), 0)
        node = native(graph, flowcache(graph, model) if patch else model, frames=4, block=1)
        results.append(sample(server, graph, node))
    plain, ours = results
    assert (ours - plain).norm() / plain.norm() < 1e-5
    assert plain.shape[2] == 4 and torch.equal(ours[:, :, :1], plain[:, :, :1])


@pytest.mark.parametrize("sampler", ["native", "ours"])
def test_the_guider_is_asked_for_recomputed_steps_alone(server, folder, sampler):
    """Forecasts are of what it gives, so they need no call of it, whatever hangs on the model."""
    results, calls = [], []
    for seen in (False, True):
        graph = Graph()
        model = flowcache(graph, load(graph), "custom", policy="even", every=4, warmup=2)
        if seen:
            model = graph.add("TestSeeEveryStep", model=model), 0
        if sampler == "native":
            node = native(graph, model, steps=8, cfg=3.0)
        else:
            node = extend(graph, model=model, steps=8, lag=4, guidance=3.0)
        before = guider_calls(server)
        results.append(sample(server, graph, node))
        calls.append(guider_calls(server) - before)
    usual, patched = results
    assert (usual - patched).norm() / patched.norm() < 1e-3
    chunks, recomputed = 4 if sampler == "ours" else 3, 3  # steps 0, 1 and 4 of 8, and a clean pass
    if sampler == "native":
        assert calls[0] == calls[1] == chunks * (recomputed + 1), calls
    else:
        assert 0 < calls[0] <= calls[1] <= chunks * (recomputed + 1), calls  # chunks of a tick share a call


def test_reuse_is_close_and_reported(server, folder):
    graph = Graph()
    model = flowcache(graph, load(graph), "custom", policy="even", every=2)
    node = native(graph, model, steps=8)
    report = graph.add("FlowCacheReport", model=model, latent=(node, 0))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="test")
    outcome = server.run(graph)
    assert outcome.error is None
    assert "forwards: 15 of 27" in outcome.outputs[report]["text"][0]  # 3 chunks of 4 of 8 steps, and a clean pass each
    assert server.saved(outcome, save)


@pytest.mark.parametrize("policy", ["flowcache", "teacache"])
@pytest.mark.parametrize("name", ["small", "small_bf16"])
def test_policies_that_watch_the_input(server, folder, policy, name):
    graph = Graph()
    model = flowcache(graph, load(graph, f"{name}.safetensors"), "custom", policy=policy, threshold=2.0)
    node = native(graph, model, steps=12)
    report = graph.add("FlowCacheReport", model=model, latent=(node, 0))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    executed = int(outcome.outputs[report]["text"][0].split("forwards: ")[1].split(" of 39")[0])
    assert 6 < executed < 39


def test_a_budget_bounds_the_history(server, folder):
    texts = []
    for budget in (0, 1):
        graph = Graph()
        model = flowcache(graph, load(graph), "off", budget)
        node = native(graph, model, frames=16)
        report = graph.add("FlowCacheReport", model=model, latent=(node, 0))
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        texts.append(outcome.outputs[report]["text"][0].splitlines()[-1])
    unbounded, bounded = (float(text.split("peak ")[1].split(" MB")[0]) for text in texts)
    assert bounded <= unbounded / 2  # two chunks of eight, and queries for the next cut


def test_guidance_and_bfloat16_work(server, folder):
    """Both crash the host's sampler without FlowCache."""
    guided, plain = Graph(), Graph()
    strong = sample(server, guided, native(guided, flowcache(guided, load(guided)), cfg=3.0))
    weak = sample(server, plain, native(plain, flowcache(plain, load(plain)), cfg=1.0))
    assert torch.isfinite(strong).all() and not torch.equal(strong, weak)
    half = Graph()
    ours = sample(server, half, native(half, flowcache(half, load(half, "small_bf16.safetensors"))))
    assert (ours - weak).norm() / weak.norm() < 0.1


def test_bypassing_the_node_leaves_no_trace(server, folder):
    def plain():
        graph = Graph()
        return sample(server, graph, native(graph, load(graph), seed=11))

    before = plain()
    graph = Graph()
    sample(server, graph, native(graph, flowcache(graph, load(graph), "fast", 1), seed=11, steps=32))
    graph = Graph()  # another seed, so that the host cannot answer from its cache
    sample(server, graph, native(graph, load(graph), seed=12))
    assert torch.equal(before, plain())


def test_two_samplers_with_other_step_counts_in_one_graph(server, folder):
    alone = []
    for steps in (8, 4):
        graph = Graph()
        model = flowcache(graph, load(graph), "custom", policy="even", every=2)
        alone.append(sample(server, graph, native(graph, model, steps=steps)))
    graph = Graph()
    model = flowcache(graph, load(graph), "custom", policy="even", every=2)
    nodes = [native(graph, model, steps=steps, seed=seed) for steps, seed in ((8, 5), (4, 5))]
    saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="two") for node in nodes]
    outcome = server.run(graph)
    assert outcome.error is None
    from safetensors.torch import load_file

    for save, expected in zip(saves, alone, strict=True):
        assert torch.equal(load_file(server.saved(outcome, save)[0])["latent_tensor"], expected)


def test_our_sampler_equals_the_hosts(server, folder):
    graph = Graph()
    expected = sample(server, graph, native(graph, load(graph)))
    graph = Graph()
    model = load(graph)
    node = native(graph, model)
    sampler = graph.add("FlowCacheARSampler", frames_per_chunk=2, lag=1000, solver="renoise")
    graph[node]["inputs"]["sampler"] = [sampler, 0]
    ours = sample(server, graph, node)
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_lora_of_the_host_is_applied(server, folder):
    weights = random_network()
    lora, merged = {}, dict(weights)
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        name = f"blocks.{layer}.self_attn.k"
        down, up = (torch.randn(s, generator=generator) * 0.2 for s in ((4, 96), (96, 4)))
        lora[f"diffusion_model.{name}.lora_A.weight"], lora[f"diffusion_model.{name}.lora_B.weight"] = down, up
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(lora, server.base / "models" / "loras" / "keys.safetensors")
    write_network(folder / "merged.safetensors", merged)
    graph = Graph()
    loaded = graph.add("LoraLoaderModelOnly", model=load(graph), lora_name="keys.safetensors", strength_model=1.0)
    ours = sample(server, graph, native(graph, flowcache(graph, (loaded, 0))))
    graph = Graph()
    expected = sample(server, graph, native(graph, load(graph, "merged.safetensors")))
    graph = Graph()
    without = sample(server, graph, native(graph, load(graph)))
    assert (ours - expected).norm() / expected.norm() < 1e-3
    assert (without - expected).norm() / expected.norm() > 1e-2


def test_fp8_weights_run(server, folder):
    exact, fp8 = Graph(), Graph()
    expected = sample(server, exact, native(exact, load(exact)))
    ours = sample(server, fp8, native(fp8, flowcache(fp8, load(fp8, dtype="fp8_e4m3fn"))))
    assert 0 < (ours - expected).norm() / expected.norm() < 0.5


def test_another_sampler_runs_as_if_unpatched(server, folder):
    outputs = []
    for patched in (False, True):
        graph = Graph()
        model = flowcache(graph, load(graph), "fast") if patched else load(graph)
        node = native(graph, model, steps=3)
        graph[node]["inputs"]["sampler"] = [graph.add("KSamplerSelect", sampler_name="euler"), 0]
        outputs.append(sample(server, graph, node))
    assert torch.equal(*outputs)
    assert "there are no chunks to reuse" in server.log.read_text()


def test_interrupt_leaves_the_network_as_it_was(server, folder):
    before = Graph()
    expected = sample(server, before, native(before, load(before), seed=31))
    graph = Graph()
    native(graph, flowcache(graph, load(graph), "off", 1), frames=256, steps=60, seed=32)
    graph.add("SaveLatent", samples=(str(len(graph)), 0), filename_prefix="test")
    threading.Thread(target=lambda: (time.sleep(3), server.post("/interrupt", {}))).start()
    assert server.run(graph).interrupted
    after = Graph()
    sample(server, after, native(after, load(after), seed=33))
    after = Graph()
    assert torch.equal(sample(server, after, native(after, load(after), seed=31)), expected)
