"""The pack in an older ComfyUI (0.3.64), found at COMFYUI_OLD_PATH, else at ~/comfy/ComfyUI-0.3.64."""

import os
from pathlib import Path

import pytest

from tests.helpers.host.comfy_server import Refused, Server
from tests.helpers.host.longvie_models import USUAL, write_longvie
from tests.helpers.host.published import write_published
from tests.helpers.host.videos import check_video
from tests.helpers.host.workflows import GRAPHS
from tests.host.conftest import CUSTOM_NODES
from tests.host.test_model_workflows import run, small
from tests.host.test_workflows import PATIENCE, node, prompt_of, saved

OLD = Path(os.environ.get("COMFYUI_OLD_PATH", Path.home() / "comfy" / "ComfyUI-0.3.64"))
pytestmark = pytest.mark.skipif(not (OLD / "main.py").exists(), reason="no older ComfyUI at COMFYUI_OLD_PATH")


@pytest.fixture(scope="module")
def old_server(tmp_path_factory):
    told_nothing = ("--preview-method", "none")  # as a server starts by itself
    base = tmp_path_factory.mktemp("old_comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "flowcache_test").symlink_to(CUSTOM_NODES, target_is_directory=True)
    running = Server(base, host=OLD, arguments=told_nothing)
    yield running
    running.stop()


def test_pack_loads(old_server):
    known = old_server.get("/object_info")
    ours = {"FlowCache", "FlowCacheLoadARVideoModel", "FlowCacheLoadDemoVAE", "FlowCacheAutoregressiveExtend"}
    ours |= {"FlowCacheMagiPrompt", "FlowCacheLoadMagiVAE"}
    assert ours <= known.keys()
    assert "IMPORT FAILED" not in old_server.log.read_text()


def test_a_graph_that_needs_a_newer_host_says_so(old_server):
    """Its template is listed on any host: the list is made of the folder's files. Its nodes are red there."""
    known = old_server.get("/object_info").keys()
    newer = {name for name in GRAPHS if {node["class_type"] for node in prompt_of(name).values()} - known}
    notes = {name for name, graph in GRAPHS.items() if "newer than ComfyUI 0.3.64" in graph.read_text(encoding="utf-8")}
    assert newer == notes and "demo_native_sampler" in newer
    with pytest.raises(Refused, match="SamplerARVideo|EmptyARVideoLatent"):
        old_server.post("/prompt", {"prompt": prompt_of("demo_native_sampler")})


def test_text_to_video(old_server):
    prompt = prompt_of("demo_text_to_video")
    outcome = old_server.run(prompt, PATIENCE)
    assert outcome.error is None and outcome.previews > 0
    check_video(saved(old_server, prompt, outcome, "flowcache/text_to_video"), 16 * 12 - 3, 256)
    (report,) = outcome.outputs[node(prompt, "FlowCacheReport")]["text"]
    assert "81% of steps reused" in report


FRAMES = {  # pixel frames of 2 chunks
    "self_forcing_text_to_video": 4 * 6 - 3,
    "longlive_2_shots": 4 * 16 - 3,
    "longvie_controlled": 2 * 5,
}


@pytest.mark.parametrize("name", FRAMES)
def test_models_of_every_layout_run(old_server, name):
    """Such a host is told no head counts and text widths, and no channels of the latent."""
    write_published(old_server.base)
    write_longvie(old_server.base / "models" / "diffusion_models", USUAL)
    prompt = small(name)
    for key, one in prompt.items():
        if one["class_type"] == "VAELoader":  # takes no VAE of another width there
            prompt[key] = {"class_type": "FlowCacheLoadDemoVAE", "inputs": {}}
        elif one["class_type"] == "FlowCacheDemoPrompt" and name.startswith("longvie"):
            prompt[key] = {"class_type": "TestCaption", "inputs": {"seed": 1, "tokens": 8, "width": USUAL.text_dim}}
    outcome = run(old_server, prompt)
    (key,) = [key for key, one in prompt.items() if one["class_type"] == "SaveVideo"]
    check_video(saved(old_server, prompt, outcome, prompt[key]["inputs"]["filename_prefix"]), FRAMES[name], 64)
