"""docs/python.md: its code runs as it stands, and the package gives the names that it shows."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import flowcache_core
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, tiny_network

CODE = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL))
SMALLER = {  # of the checkpoint and of the calibration
    "chunks=7": "chunks=2",
    "latent_size=(60, 104)": "latent_size=(6, 4)",
    "decode=lambda latents: demo.decode(latents, chunk_frames=3)": "decode=lambda latents: latents",
    "minutes=30": "minutes=0, chunks=2, steps=8, lag=2, counts=(3, 5)",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The page's code, run in a folder with a small checkpoint under the name that the page gives; its variables."""
    folder, code = tmp_path_factory.mktemp("page"), CODE
    told = json.dumps({"transformer": {"num_heads": TINY.num_heads, "text_dim": TINY.text_dim}})
    save_file(tiny_network().state_dict(), folder / "self_forcing_dmd.safetensors", metadata={"config": told})
    save_file({"embedding": torch.ones(1, 4, TINY.text_dim)}, folder / "caption.safetensors")
    for shown, small in SMALLER.items():
        assert shown in code
        code = code.replace(shown, small)
    script = tmp_path_factory.mktemp("script") / "page.py"
    script.write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = runpy.run_path(str(script))
    return names | {"folder": folder}


def test_the_page_makes_what_it_says(ran):
    written = {path.name for path in ran["folder"].iterdir()}
    assert {"report.png", "circle.mp4", "circle.safetensors", "network.flowcache.json"} <= written
    assert ran["made"] == [0, 1]
    assert ran["pixels"].shape == (3, 33, 64, 64)


def test_going_on_keeps_what_was_there(ran):
    before = load_file(ran["folder"] / "circle.safetensors")["latents"]
    assert torch.equal(ran["longer"].latents[:, :, : before.shape[2]], before)
    assert ran["longer"].latents.shape[2] == before.shape[2] + 6


def test_the_budget_bounds_the_history(ran):
    report = ran["short"].report
    assert report.history_bytes_allocated < report.history_bytes_unbounded


def test_a_measured_model_knows_its_steps(ran):
    counts = [len(one.steps) for one in ran["measured"].curve]
    assert counts[0] == 3 and counts in ([3], [3, 5])  # five that are no better than three are not offered
    assert ran["high"].reuse.made_for == (64, 16)  # of the demo model's own


def test_a_checkpoint_runs_as_its_family_does(ran):
    assert ran["video"].latents.shape == (1, 4, 6, 6, 4)
    assert ran["video"].report.schedule.steps == 4


def test_every_name_is_there():
    for name in flowcache_core.__all__:
        assert getattr(flowcache_core, name).__module__.split(".")[0] == "flowcache_core", name
    assert {"generate", "demo", *flowcache_core.__all__} <= {*dir(flowcache_core)}
    assert callable(flowcache_core.generate) and callable(flowcache_core.calibrate)
    with pytest.raises(AttributeError, match="'nothing'"):
        flowcache_core.nothing  # noqa: B018


def test_the_package_alone_loads_no_torch():
    program = "import sys, flowcache_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
