"""Long runs in the real host: video written meanwhile, prompts over time, going on after an interrupt or a kill."""

import errno
import io
import json
import shutil
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flowcache_core.demo import vae as demo_vae
from flowcache_core.storage.state import load_state, save_state
from tests.helpers.host.comfy_server import Refused, Server
from tests.helpers.host.graph import Graph, fails, random_network, sample, write_network
from tests.helpers.host.videos import frames_of
from tests.host.soak import set_up
from tests.host.test_extend import extend, flowcache


@pytest.fixture(scope="module", autouse=True)
def files(server):
    fill(server.base)


def fill(base: Path) -> None:
    write_network(base / "models" / "diffusion_models" / "extend.safetensors", random_network())
    (base / "models" / "vae" / "wan_layout.safetensors").write_bytes(Path(demo_vae.SHIPPED).read_bytes())


def streamed(graph: Graph, stock: bool = False, **inputs) -> tuple[str, str, str]:
    """A graph's VAE, stream and Extend nodes; the report makes the Extend node run."""
    vae = graph.add("VAELoader", vae_name="wan_layout.safetensors") if stock else graph.add("FlowCacheLoadDemoVAE")
    keep = inputs.pop("keep_latents", True)
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="long/v", fps=8.0, keep_latents=keep)
    node = extend(graph, stream=(stream, 0), **inputs)
    graph.add("FlowCacheReport", report=(node, 2))
    return vae, stream, node


def images_of(server, graph: Graph, vae: str, node: str) -> np.ndarray:
    """What the host's own VAE Decode makes of a node's latent, uint8 [T, H, W, 3]."""
    images = graph.add("VAEDecode", samples=(node, 0), vae=(vae, 0))
    save = graph.add("SaveImage", images=(images, 0), filename_prefix="whole")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    return outcome, np.stack([np.asarray(Image.open(file)) for file in server.saved(outcome, save)])


@pytest.mark.parametrize("stock", [False, True], ids=["demo VAE", "stock Wan VAE"])
def test_streamed_video_is_what_the_vae_makes_of_the_whole(server, stock):
    graph = Graph()
    vae, _, node = streamed(graph, stock, chunks=3, frames_per_chunk=3, seed=50)
    outcome, whole = images_of(server, graph, vae, node)
    (file,) = server.saved(outcome, node)
    video = frames_of(file)
    assert video.shape == whole.shape == (33, 64, 64, 3)
    # h264 loses some; a seam between chunks would lose far more in the frames after it.
    loss = np.abs(video.astype(float) - whole).mean(axis=(1, 2, 3))
    shifted = np.abs(video[1:].astype(float) - whole[:-1]).mean()
    assert loss.max() < 6 and loss.max() < shifted


def test_workflow_settings_and_report_are_in_the_video(server):
    graph = Graph()
    _, _, node = streamed(graph, seed=51, model=flowcache(graph, preset="high", history_budget=1))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, node)
    with av.open(str(file)) as video:
        told = {name: json.loads(value) for name, value in video.metadata.items() if name in ("prompt", "flowcache")}
    assert told["prompt"] == graph
    assert (
        told["flowcache"]["settings"] == "FlowCache high, history budget 1 chunks" and told["flowcache"]["chunks"] == 2
    )


@pytest.mark.parametrize("refused", [errno.ENOSPC, errno.EACCES], ids=["full disk", "held open by a player"])
def test_a_video_that_cannot_be_written_anew_costs_nothing_else(server, refused):
    """It needs its space twice, and Windows replaces no file that is open."""
    graph = Graph()
    _, _, node = streamed(graph, seed=73)
    saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")]
    saves += [graph.add("FlowCacheSaveState", state=(node, 1), filename_prefix="s")]
    set_up(server, refused=refused)
    try:
        outcome = server.run(graph)
    finally:
        set_up(server)
    assert outcome.error is None, outcome.error["exception_message"]
    latent, state = (server.saved(outcome, save)[0] for save in saves)
    assert load_file(latent)["latent_tensor"].shape[2] == load_state(state).frames == 4
    (video,) = server.saved(outcome, node)
    assert len(frames_of(video)) == 13 and [file.name for file in video.parent.glob(f".{video.stem}*")] == []
    (report,) = (out["text"][0] for out in outcome.outputs.values() if "text" in out and "chunks" in out["text"][0])
    assert f"plays, but has its index behind, and neither sound nor report inside: Cannot write {video}" in report


def test_finished_chunks_are_shown_decoded(server):
    graph, sizes = Graph(), []

    def look(kind, message):
        start = message.find(b"\xff\xd8") if kind == "binary" else -1
        if start > 0:
            sizes.append(Image.open(io.BytesIO(message[start:])).size)

    streamed(graph, chunks=3, seed=52)
    assert server.run(graph, on_event=look).error is None
    assert sum(width == 3 * height for width, height in sizes) == 3  # three frames side by side, a chunk


def test_without_latents_the_video_is_whole_and_the_state_goes_on(server):
    expected = Graph()
    last = sample(server, expected, extend(expected, chunks=5, seed=53))[:, :, -2:]
    graph = Graph()
    _, stream, node = streamed(graph, chunks=4, seed=53, keep_latents=False)
    more = extend(graph, chunks=1, seed=53, state=(node, 1))
    save = graph.add("SaveLatent", samples=(more, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, node)
    assert len(frames_of(file)) == 4 * 8 - 3
    latent = load_file(server.saved(outcome, save)[0])["latent_tensor"]
    assert latent.shape[2] == 4 and torch.allclose(latent[:, :, 2:], last, atol=1e-4)


def test_a_stream_alone_is_enough(server):
    """No output node is there; an Extend that nothing needs and that streams nothing is still left alone."""
    graph = Graph()
    node = streamed(graph, seed=58)[2]
    del graph[next(name for name, each in graph.items() if each["class_type"] == "FlowCacheReport")]
    idle = extend(graph, seed=59, model=tuple(graph[node]["inputs"]["model"]))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, node)
    assert len(frames_of(file)) == 13 and node in outcome.executed and idle not in outcome.executed
    again = server.run(graph)
    assert again.error is None and not again.executed  # the host's cache holds


def test_without_a_stream_or_an_output_the_host_says_so(server):
    graph = Graph()
    extend(graph, seed=59)
    with pytest.raises(Refused, match="no outputs"):
        server.run(graph)


def test_file_names_stay_in_the_output_folder(server):
    for prefix in ("../out", "/tmp/out", "a/../../out"):
        graph = Graph()
        _, stream, _ = streamed(graph, seed=54)
        graph[stream]["inputs"]["filename_prefix"] = prefix
        outcome = server.run(graph)
        assert outcome.error["node_id"] == stream and "output folder" in outcome.error["exception_message"]


def over_time(graph: Graph, text: str, **inputs) -> str:
    prompts = graph.add("FlowCachePromptsOverTime", text=text)
    node = extend(graph, **inputs)
    graph[node]["inputs"]["positive"] = [prompts, 0]
    return node


def test_one_prompt_over_time_is_that_prompt(server):
    plain, timed = Graph(), Graph()
    expected = sample(server, plain, extend(plain, guidance=3.0, seed=55))
    assert torch.equal(sample(server, timed, over_time(timed, "0-: a red circle", guidance=3.0, seed=55)), expected)


def test_prompts_over_time_are_chained_extensions(server):
    chained, timed = Graph(), Graph()
    begun = extend(chained, "a red circle", chunks=2, guidance=3.0, seed=56)
    expected = sample(
        server, chained, extend(chained, "a blue square", chunks=2, guidance=3.0, seed=56, state=(begun, 1))
    )
    node = over_time(timed, "0-1: a red circle\n2-: a blue square", chunks=4, guidance=3.0, seed=56)
    assert torch.allclose(sample(server, timed, node), expected, atol=1e-4)


def test_blends_lie_between_and_begin_alike(server):
    graphs = [Graph() for _ in range(3)]
    texts = ["0: a red circle\n2-: a blue square", "0-: a red circle", "0: a red circle\n1-: a blue square"]
    blend, first, second = (
        sample(server, graph, over_time(graph, text, chunks=2, seed=57))
        for graph, text in zip(graphs, texts, strict=True)
    )
    assert torch.equal(blend[:, :, :2], first[:, :, :2])
    for other in (first, second):
        assert 0 < (blend[:, :, 2:] - other[:, :, 2:]).norm() < (first[:, :, 2:] - second[:, :, 2:]).norm()


def test_memory_is_planned_for_the_prompts_that_hold_at_once(server):
    def planned(text: str) -> str:
        graph = Graph()
        node = over_time(graph, text, guidance=3.0, seed=57)
        graph.add("FlowCacheReport", report=(node, 2))
        return next(text for name, text in server.run(graph).texts if name == node and "planned" in text)

    lines = "\n".join(f"{2 * number}: a {['red', 'blue'][number % 2]} circle" for number in range(40))
    assert planned(lines) == planned("0: a red circle\n1-: a blue circle")


def test_a_blend_that_another_node_changes_is_refused(server):
    graph = Graph()
    prompts = graph.add("FlowCachePromptsOverTime", text="0: a red circle | a blue square")
    emptied = graph.add("ConditioningZeroOut", conditioning=(prompts, 0))
    node = extend(graph, seed=57)
    graph[node]["inputs"]["positive"] = [emptied, 0]
    assert "another node has changed" in fails(server, graph, node)


def test_prompts_that_cannot_be_read_fail_on_their_node(server):
    graph = Graph()
    graph.add("SaveLatent", samples=(over_time(graph, "0-4 a red circle"), 0), filename_prefix="s")
    error = server.run(graph).error
    assert (
        graph[error["node_id"]]["class_type"] == "FlowCachePromptsOverTime" and "Line 1" in error["exception_message"]
    )


def resumable(graph: Graph, chunks: int, seed: int, budget: int = 2, **inputs) -> str:
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    model = flowcache(graph, preset="high", history_budget=budget)
    _, _, node = streamed(graph, chunks=chunks, seed=seed, model=model, resume=(resume, 0), **inputs)
    return node


def stop_after(server, count: int, how) -> None:
    """Calls `how` when so many chunks of a run are on disk."""
    runs = server.base / "user" / "flowcache" / "runs"
    before = set(runs.glob("*/chunk-*"))

    def watch():
        while len(set(runs.glob("*/chunk-*")) - before) < count:
            time.sleep(0.01)
        how()

    threading.Thread(target=watch, daemon=True).start()


def plain(server, chunks: int, seed: int, **inputs) -> torch.Tensor:
    graph = Graph()
    model = flowcache(graph, preset="high", history_budget=2)
    return sample(server, graph, extend(graph, chunks=chunks, seed=seed, model=model, **inputs))


def earlier(outcome, graph: Graph) -> int:
    """Chunks that were there, by the report."""
    (name,) = (name for name, node in graph.items() if node["class_type"] == "FlowCacheReport")
    (line,) = (line for line in outcome.outputs[name]["text"][0].splitlines() if "interrupted run" in line)
    return int(line.split()[0])


def interrupt(server, graph: Graph) -> None:
    """Begins a run that is kept, and interrupts it when three of its chunks are on disk."""
    stop_after(server, 3, lambda: server.post("/interrupt", {}))
    assert server.run(graph).interrupted


def resumed(server, graph: Graph, node: str) -> tuple[torch.Tensor, int]:
    """Begins an interrupted run again; gives the latent that it makes, and how many chunks were there."""
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    return load_file(server.saved(outcome, save)[0])["latent_tensor"], earlier(outcome, graph)


def test_interrupted_run_goes_on_to_the_same_bits(server):
    graph = Graph()
    node = resumable(graph, chunks=8, seed=60, steps=20, lag=20)
    interrupt(server, graph)
    video = max((server.base / "output" / "long").glob("*.mp4"), key=lambda file: file.stat().st_mtime)
    assert len(frames_of(video)) >= 3 * 8 - 3 - 4  # the interrupted file plays
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    (patched,) = (node for node in graph.values() if node["class_type"] == "FlowCache")
    patched["inputs"] |= {"history_memory": "system", "overlap": False}  # what a user may try, and changes no result
    outcome = server.run(graph)
    assert 3 <= earlier(outcome, graph) < 8
    assert any("from the interrupted run" in text for name, text in outcome.texts if name == node)
    assert "chunk 8 of 8" in outcome.texts[-1][1]
    resumed = load_file(server.saved(outcome, save)[0])["latent_tensor"]
    assert torch.equal(resumed, plain(server, 8, 60, steps=20, lag=20))
    (file,) = server.saved(outcome, node)
    assert len(frames_of(file)) == 8 * 8 - 3
    assert not video.exists()  # the whole one stands in its place


def test_resume_changes_no_bit_where_several_chunks_are_active(server):
    latents = []
    for resume in (False, True):
        graph = Graph()
        kept = {"resume": (graph.add("FlowCacheResume", limit_gb=1.0), 0)} if resume else {}
        latents.append(sample(server, graph, extend(graph, chunks=5, steps=6, lag=1, seed=67, guidance=3.0, **kept)))
    assert torch.equal(*latents)


def test_a_run_that_cannot_be_kept_stops_or_goes_on(server):
    """Where the folder of all runs should be lies a file."""
    runs = server.base / "user" / "flowcache" / "runs"
    if runs.exists():
        runs.rename(runs.with_name("aside"))
    runs.parent.mkdir(exist_ok=True)
    runs.write_bytes(b"")
    try:
        for choice in ("stop", "go on unkept"):
            graph = Graph()
            resume = graph.add("FlowCacheResume", limit_gb=1.0, on_full_disk=choice)
            node = extend(graph, seed=68, resume=(resume, 0))
            report = graph.add("FlowCacheReport", report=(node, 2))
            if choice == "stop":
                assert "Cannot write" in fails(server, graph, node)
            else:
                assert "not kept to resume from any more" in server.run(graph).outputs[report]["text"][0]
    finally:
        runs.unlink()
        if runs.with_name("aside").exists():
            runs.with_name("aside").rename(runs)


def test_another_seed_or_length_starts_anew(server):
    for seed, chunks in ((61, 2), (62, 2), (61, 3)):
        graph = Graph()
        resumable(graph, chunks=chunks, seed=seed)
        outcome = server.run(graph)
        (text,) = (out["text"][0] for out in outcome.outputs.values() if "text" in out)
        assert "interrupted" not in text


def was_kept(server, node: str = "", settings: dict | None = None) -> bool:
    """Whether a run was there to resume; what `node` hangs on its model is made anew, as after a restart."""
    graph = Graph()
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    model = flowcache(graph, preset="off", history_budget=0)
    if node:
        model = graph.add(node, model=model, **settings), 0
    extended = extend(graph, model=model, resume=(resume, 0), seed=66, guidance=3.0, steps=1, lag=1)
    graph.add("FlowCacheReport", report=(extended, 2))
    server.free()
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    return "interrupted run" in str(outcome.outputs)


@pytest.fixture(scope="module")
def kept_plain(server) -> bool:
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    ends = {end: f"diffusion_model.blocks.0.self_attn.q.lora_{end}.weight" for end in "AB"}
    save_file({ends["A"]: torch.ones(4, 96), ends["B"]: torch.ones(96, 4)}, loras / "kept.safetensors")
    return not was_kept(server) and was_kept(server)


SKIP_LAYERS = {
    **{"double_layers": "0", "single_layers": "0", "scale": 3.0},
    **{"start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0},
}


@pytest.mark.parametrize(
    ("node", "settings"),
    [
        ("TCFG", {}),
        ("CFGNorm", {"strength": 1.0, "pre_cfg": False}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("RescaleCFG", {"multiplier": 0.6}),
        ("Mahiro", {}),
        ("CFGZeroStar", {}),
        ("SkipLayerGuidanceDiT", SKIP_LAYERS),
        ("Epsilon Scaling", {"scaling_factor": 1.1}),
        ("ScaleROPE", {f"{what}_{axis}": float(what == "scale") for what in ("scale", "shift") for axis in "xyt"}),
        ("ModelSamplingSD3", {"shift": 2.0}),
        ("LoraLoaderModelOnly", {"lora_name": "kept.safetensors", "strength_model": 1.0}),
    ],
)
def test_a_run_with_another_node_on_the_model_is_another_run(server, kept_plain, node, settings):
    assert kept_plain and not was_kept(server, node, settings) and was_kept(server, node, settings)


def test_resume_is_refused_where_a_node_cannot_be_looked_into(server):
    graph = Graph()
    resume = graph.add("FlowCacheResume", limit_gb=1.0)
    model = graph.add("TestSeeEveryStep", model=flowcache(graph, preset="off", history_budget=0), opaque=True), 0
    assert "cannot be told from others" in fails(server, graph, extend(graph, model=model, resume=(resume, 0)))


def test_a_run_of_an_earlier_version_starts_anew_and_says_so(server):
    """Its folder has the name of settings that are no more."""
    runs = server.base / "user" / "flowcache" / "runs"
    before = set(runs.glob("*"))
    for seed, told in ((64, False), (65, True)):
        graph = Graph()
        resumable(graph, chunks=2, seed=seed)
        outcome = server.run(graph)
        (text,) = (out["text"][0] for out in outcome.outputs.values() if "text" in out)
        assert ("an earlier version of FlowCache cannot be resumed: this one starts anew" in text) == told
        if not told:
            (old,) = set(runs.glob("*")) - before
            for file in (*old.glob("history-*"), *old.glob("added-*")):
                save_state(load_state(file), file)  # which does not say the run's format, as in 0.1.0
    shutil.rmtree(old)


def test_killed_server_loses_only_the_active_chunks(tmp_path):
    graph = Graph()
    fill_after = Server(tmp_path)
    fill(tmp_path)
    node = resumable(graph, chunks=8, seed=63, steps=20, lag=20)
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    stop_after(fill_after, 3, fill_after.process.kill)
    with pytest.raises((ConnectionError, OSError)):
        fill_after.run(graph)
    fill_after.process.wait()
    kept = len(list((tmp_path / "user" / "flowcache" / "runs").glob("*/chunk-*")))
    (video,) = (tmp_path / "output" / "long").glob("*.mp4")
    assert len(frames_of(video)) >= (kept - 1) * 8 - 3 - 5  # less what the VAE and the encoder held back
    again = Server(tmp_path)
    try:
        outcome = again.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        assert kept - 1 <= earlier(outcome, graph) <= kept  # a chunk counts once its state is on disk as well
        resumed = load_file(again.saved(outcome, save)[0])["latent_tensor"]
        assert torch.equal(resumed, plain(again, 8, 63, steps=20, lag=20))
    finally:
        again.stop()


def test_two_videos_compared(server):
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE")
    videos = []
    for preset in ("off", "fast"):
        node = extend(graph, seed=70, steps=8, lag=8, model=flowcache(graph, preset=preset, history_budget=0))
        videos.append((graph.add("VAEDecode", samples=(node, 0), vae=(vae, 0)), 0))
    shown = graph.add("FlowCacheCompareVideos", first=videos[0], second=videos[1], view="side by side")
    same = graph.add("FlowCacheCompareVideos", first=videos[0], second=videos[0], view="wipe")
    saves = [graph.add("SaveImage", images=(node, 0), filename_prefix="compare") for node in (shown, same)]
    plot = graph.add("SaveImage", images=(shown, 2), filename_prefix="plot")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (words,), (equal,) = (outcome.outputs[node]["text"] for node in (shown, same))
    assert "13 frames are equal" in equal and words.startswith("PSNR")
    sizes = [Image.open(server.saved(outcome, save)[0]).size for save in saves]
    assert sizes == [(64 + 8 + 64, 64), (64, 64)] and len(server.saved(outcome, saves[0])) == 13
    assert Image.open(server.saved(outcome, plot)[0]).width == 800


def test_saved_video_has_workflow_and_report(server):
    graph = Graph()
    vae = graph.add("FlowCacheLoadDemoVAE")
    node = extend(graph, seed=71, model=flowcache(graph, preset="high", history_budget=0, history_memory="system"))
    images = graph.add("VAEDecode", samples=(node, 0), vae=(vae, 0))
    save = graph.add("FlowCacheSaveVideo", images=(images, 0), report=(node, 2), filename_prefix="long/s", fps=12.0)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, save)
    assert len(frames_of(file)) == 13
    with av.open(str(file)) as video:
        assert json.loads(video.metadata["prompt"]) == graph
        assert json.loads(video.metadata["flowcache"])["chunks"] == 2
        assert video.streams.video[0].average_rate == 12


def test_history_in_system_memory_changes_nothing(server):
    results = []
    for memory in ("auto", "system"):
        graph = Graph()
        model = flowcache(graph, preset="off", history_budget=1, history_memory=memory)
        results.append(sample(server, graph, extend(graph, chunks=4, seed=72, model=model)))
    assert torch.equal(*results)
