"""The worked example of CONTRIBUTING.md: a new family, by nothing but the code that stands there."""

import json
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flowcache_core import checkpoints, generate
from flowcache_core.models import families
from flowcache_core.models.families import family, family_preset
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import HistorySettings
from tests.helpers.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def unit_time(tmp_path) -> families.Family:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    before = dict(families.FAMILIES), dict(checkpoints.FAMILIES)
    file = tmp_path / "unit_time.py"
    file.write_text(code, encoding="utf-8")
    runpy.run_path(str(file))
    yield family("unit time")
    for names, kept in zip((families.FAMILIES, checkpoints.FAMILIES), before, strict=True):
        names.clear()
        names.update(kept)


def run(backbone: WanBackbone, usual: families.Family) -> torch.Tensor:
    settings = family_preset("balanced", "unit time", backbone.dim, HistorySettings(2))
    return generate(
        backbone,
        torch.ones(1, 4, 16),
        chunks=4,
        steps=usual.steps,
        lag=usual.lag,
        frames_per_chunk=1,
        settings=settings,
        seed=3,
    ).latents


def test_new_family_is_one_file_and_two_entries(unit_time, backbone, tmp_path):
    network = backbone.network
    file = tmp_path / "unit_time.safetensors"
    sizes = json.dumps({"transformer": {"num_heads": backbone.heads}})
    save_file(network.state_dict(), file, metadata={"config": sizes})
    assert checkpoints.inspect(file, "unit time").family == "unit time"
    assert checkpoints.convert(file, tmp_path / "stamped.safetensors", "unit time").family == "unit time"
    ours = run(unit_time.backbone(network, 24, F.scaled_dot_product_attention), unit_time)
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, run(backbone, unit_time), atol=1e-3)
