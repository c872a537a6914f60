"""Calibrate FlowCache writes beside the model, and the preset `quality` reads what it wrote."""

import json

from tests.helpers.host.graph import Graph, random_network, write_network


def test_a_models_own_calibration_is_used(server):
    folder = server.base / "models" / "diffusion_models"
    write_network(folder / "calibrated.safetensors", random_network())
    graph = Graph()
    loaded = graph.add(
        "FlowCacheLoadARVideoModel", model_name="calibrated.safetensors", family="causal", weight_type="default"
    )
    words = [(graph.add("FlowCacheDemoPrompt", caption=caption), 0) for caption in ("a red circle", "")]
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    node = graph.add(
        "FlowCacheCalibrate", model=(loaded, 0), positive=words[0], negative=words[1], vae=vae, seed=1,
        chunks=1, minutes=0.0, steps=8, width=64, height=64,
    )  # fmt: skip
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert "written to calibrated.flowcache.json" in outcome.outputs[node]["text"][0]
    path = folder / "calibrated.flowcache.json"
    told = json.loads(path.read_text())
    assert [len(one["steps"]) for one in told["curve"]] == [5, 6, 7] and told["steps"] == 8
    # A list of two steps, said to be good enough, shows that the file is what the preset goes by.
    told["curve"] = [{"steps": [0, 4], "psnr": 90.0}]
    path.write_text(json.dumps(told))
    using = Graph()
    loaded = using.add(
        "FlowCacheLoadARVideoModel", model_name="calibrated.safetensors", family="causal", weight_type="default"
    )
    patched = using.add("FlowCache", model=(loaded, 0), preset="quality", history_budget=0, quality=0.5)
    words = [(using.add("FlowCacheDemoPrompt", caption=caption), 0) for caption in ("a red circle", "")]
    made = using.add(
        "FlowCacheAutoregressiveExtend", model=(patched, 0), positive=words[0], negative=words[1], seed=1, chunks=2,
        steps=8, guidance=1.0, frames_per_chunk=3, lag=8, width=64, height=64,
    )  # fmt: skip
    report = using.add("FlowCacheReport", report=(made, 2))
    outcome = server.run(using)
    assert outcome.error is None, outcome.error["exception_message"]
    assert "forwards: 6 of 18" in outcome.outputs[report]["text"][0]
