"""Converted checkpoints in ComfyUI's stock loader; fp8, fp16, LoRA and packed layers under our backbone."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from flowcache_core.checkpoints import convert
from flowcache_core.history.positions import rotate
from flowcache_core.models.skyreels import SkyReelsBackbone
from flowcache_core.models.wan import WanBackbone, WanNetwork
from tests.checkpoints.test_checkpoints import sharded
from tests.checkpoints.test_diffusers import to_diffusers
from tests.helpers import golden_weights
from tests.helpers.golden_weights import SMALL, SMALL_FPS
from tests.helpers.host.comfy_server import HOST, PACK, host_python
from tests.helpers.magi_weights import normal

X, TEXT, SIGMA = normal("x", (1, 16, 2, 4, 6)), golden_weights.text("cond"), torch.tensor([0.6])
BARE = replace(SMALL, cross_attn_norm=False, eps=0.01)
LORA = [  # a layer of every kind
    *(f"blocks.{block}.{part}.{name}" for block, part in ((0, "self_attn"), (1, "cross_attn")) for name in "qkvo"),
    "blocks.2.ffn.0", "blocks.2.ffn.2", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "head.head", "patch_embedding",
]  # fmt: skip


def ours(weights: dict[str, torch.Tensor], config=SMALL, fps: int = 0) -> torch.Tensor:
    """What our own network makes of the same weights, in float32."""
    network = WanNetwork(config).requires_grad_(False)
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    backbone = SkyReelsBackbone(network, fps) if fps else WanBackbone(network)
    table = backbone.rotary.table(torch.arange(2), 2, 3)

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)

    return backbone.head(X, SIGMA, backbone.trunk(X, SIGMA, backbone.context(TEXT), attend))


def rounded(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: w if "patch_embedding" in name else w.to(dtype).float() for name, w in weights.items()}


def lora_files(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA of rank 4, and what it adds to each weight."""
    saved, added = {}, {}
    for layer in LORA:
        shape = golden_weights.network().get_submodule(layer).weight.shape
        down, up = 0.1 * normal(f"{layer}.down", (4, shape[1:].numel())), 0.1 * normal(f"{layer}.up", (shape[0], 4))
        saved |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
        added[f"{layer}.weight"] = (up @ down).reshape(shape)
    save_file(saved, path)
    return path, added


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All jobs in one process of the host: name -> (velocity, metadata, expected)."""
    base = tmp_path_factory.mktemp("weights")
    weights, with_fps = (golden_weights.network(config).state_dict() for config in (SMALL, SMALL_FPS))
    metadata = {"config": json.dumps({"transformer": {"num_heads": SMALL.num_heads}})}
    save_file({"x": X, "text": TEXT, "sigma": SIGMA}, base / "inputs.safetensors")
    # Sources in the layouts that people have; where there is no metadata, the heads come from a config.json.
    sources = {}
    for name, tensors in (("diffusers", {to_diffusers(n): w for n, w in with_fps.items()}), ("upstream", weights)):
        (base / name).mkdir()
        save_file(tensors, base / name / "model.safetensors")
        told = {"dim": SMALL.dim, "num_heads": SMALL.num_heads, "inject_sample_info": name == "diffusers"}
        (base / name / "config.json").write_text(json.dumps(told))
        sources[name] = base / name
    sources["shards"] = sharded(base / "shards", weights).parent
    (base / "shards" / "config.json").write_text(json.dumps({"dim": SMALL.dim, "num_heads": SMALL.num_heads}))
    prefixed = {f"model.diffusion_model.{n}": w for n, w in weights.items()}
    save_file(prefixed, base / "repack.safetensors", metadata)
    sources["repack"] = base / "repack.safetensors"
    (base / "pt").mkdir()
    (base / "pt" / "config.json").write_text(json.dumps({"dim": SMALL.dim, "num_heads": SMALL.num_heads}))
    torch.save(
        {"generator_ema": {f"model._fsdp_wrapped_module.{n}": w for n, w in weights.items()}}, base / "pt" / "a.pt"
    )
    sources["pt"] = base / "pt"

    (base / "bare").mkdir()
    save_file({n: w for n, w in weights.items() if ".norm3." not in n}, base / "bare" / "model.safetensors")
    told = {"dim": SMALL.dim, "num_heads": SMALL.num_heads, "eps": BARE.eps}
    (base / "bare" / "config.json").write_text(json.dumps(told))
    sources["bare"] = base / "bare" / "model.safetensors"

    def converted(name: str, family: str, dtype=None, source: str = "upstream") -> str:
        out = base / f"{name}.converted.safetensors"
        convert(sources[source], out, family, dtype)
        return str(out)

    lora, added = lora_files(base / "lora.safetensors")
    merged = {name: weight + added.get(name, 0) for name, weight in weights.items()}
    plain = converted("plain", "causal")
    jobs = {
        "pt": ({"path": converted("pt", "causal", source="pt")}, weights),
        "shards": ({"path": converted("shards", "rolling", source="shards")}, weights),
        "repack": ({"path": converted("repack", "wan", source="repack")}, weights),
        "diffusers": ({"path": converted("diffusers", "skyreels", source="diffusers"), "fps": 16}, with_fps),
        "bare": (
            {"path": converted("bare", "causal", source="bare")},
            {n: w for n, w in weights.items() if ".norm3." not in n},
        ),
        "fp16": (
            {"path": converted("fp16", "causal", torch.float16), "dtype": "float16"},
            rounded(weights, torch.float16),
        ),
        "fp8": ({"path": plain, "dtype": "float8_e4m3fn"}, rounded(weights, torch.float8_e4m3fn)),
        "lora": ({"path": plain, "lora": str(lora)}, merged),
        "packed": ({"path": plain, "packed": True}, weights),
    }
    todo = [
        job | {"inputs": str(base / "inputs.safetensors"), "out": str(base / f"{name}.result.safetensors")}
        for name, (job, _) in jobs.items()
    ]
    (base / "jobs.json").write_text(json.dumps(todo))
    script = Path(__file__).with_name("run_weights.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [host_python(), script, HOST, PACK, base / "jobs.json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, (job, expected) in jobs.items():
        with safe_open(base / f"{name}.result.safetensors", framework="pt") as file:
            fps = job.get("fps", 0)
            config = BARE if name == "bare" else SMALL_FPS if fps else SMALL
            found[name] = file.get_tensor("velocity"), file.metadata(), ours(expected, config, fps)
    return found


def error(result) -> float:
    found, _, expected = result
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("pt", "CausalWanModel"),
        ("shards", "CausalWanModel"),
        ("repack", "WanModel"),
        ("diffusers", "WanModel"),
        ("bare", "CausalWanModel"),
    ],
)
def test_stock_loader_reads_converted_files(results, name, network):
    assert results[name][1]["network"] == network
    assert error(results[name]) < 1e-4


def test_fp16(results):
    assert results["fp16"][1]["weights"] == "float16"
    assert error(results["fp16"]) < 5e-3


def test_fp8(results):
    assert results["fp8"][1]["weights"] == "float8_e4m3fn"
    assert error(results["fp8"]) < 2e-2


def test_lora(results):
    assert error(results["lora"]) < 1e-4
    assert error((results["pt"][0], None, results["lora"][2])) > 1e-2  # the LoRA does something


def test_packed_layers(results):
    assert results["packed"][1]["weights"] == "int8"
    assert 1e-4 < error(results["packed"]) < 2e-2  # what rounding to 8 bits costs
