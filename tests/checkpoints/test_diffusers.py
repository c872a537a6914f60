"""Files and folders as diffusers saves them; names, files and config.json were compared with those of 0.42.1."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core.checkpoints import convert, inspect, load, load_backbone
from flowcache_core.checkpoints.backbone import Loaded
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.checkpoints.test_load_backbone import velocity

CONFIG = WanConfig(dim=128, ffn_dim=96, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)
SETTINGS = {  # of that network; diffusers writes more, none of which is needed
    "_class_name": "WanTransformer3DModel", "attention_head_dim": 32, "num_attention_heads": 4, "num_layers": 2,
    "eps": 1e-06,
}  # fmt: skip

DIFFUSERS = {  # spelt out by hand, so that the table in the code is checked against something
    "patch_embedding.weight": "patch_embedding.weight",
    "condition_embedder.text_embedder.linear_1.bias": "text_embedding.0.bias",
    "condition_embedder.text_embedder.linear_2.weight": "text_embedding.2.weight",
    "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
    "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
    "condition_embedder.time_proj.weight": "time_projection.1.weight",
    "blocks.1.scale_shift_table": "blocks.1.modulation",
    "blocks.1.attn1.to_q.weight": "blocks.1.self_attn.q.weight",
    "blocks.1.attn1.to_out.0.bias": "blocks.1.self_attn.o.bias",
    "blocks.1.attn1.norm_k.weight": "blocks.1.self_attn.norm_k.weight",
    "blocks.0.attn2.to_v.weight": "blocks.0.cross_attn.v.weight",
    "blocks.0.attn2.norm_q.weight": "blocks.0.cross_attn.norm_q.weight",
    "blocks.0.norm2.weight": "blocks.0.norm3.weight",
    "blocks.0.ffn.net.0.proj.weight": "blocks.0.ffn.0.weight",
    "blocks.0.ffn.net.2.bias": "blocks.0.ffn.2.bias",
    "scale_shift_table": "head.modulation",
    "proj_out.weight": "head.head.weight",
    "fps_embedding.weight": "fps_embedding.weight",
    "fps_projection.net.0.proj.weight": "fps_projection.0.weight",
    "fps_projection.net.2.bias": "fps_projection.2.bias",
}


def to_diffusers(name: str) -> str:
    """Our names by diffusers', for every tensor of a network."""
    pieces = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "fps_projection.0": "fps_projection.net.0.proj",
        "fps_projection.2": "fps_projection.net.2",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
        "modulation": "scale_shift_table",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",
        ".o.": ".to_out.0.",
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
        "self_attn": "attn1",
        "cross_attn": "attn2",
    }
    for ours, theirs in pieces.items():
        name = name.replace(ours, theirs)
    return name


def weights(**changes) -> dict[str, torch.Tensor]:
    """Of a random network, under diffusers' names."""
    torch.manual_seed(0)
    network = WanNetwork(WanConfig(**(CONFIG.__dict__ | changes)))
    return {to_diffusers(name): tensor for name, tensor in network.state_dict().items()}


def folder(path: Path, tensors=None, weight_file: str = "diffusion_pytorch_model.safetensors", **settings) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SETTINGS | settings))
    save_file(tensors or weights(), path / weight_file)
    return path


def same(one: Loaded, other: Loaded) -> bool:
    return torch.allclose(velocity(one.backbone), velocity(other.backbone), rtol=1e-5, atol=1e-4)


def test_names(tmp_path):
    config = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, text_dim=40, fps=True)
    tensors = WanNetwork(config).state_dict()
    theirs = {to_diffusers(name): tensor for name, tensor in tensors.items()}
    for name, ours in DIFFUSERS.items():
        assert torch.equal(theirs[name], tensors[ours])
    save_file(theirs, tmp_path / "a.safetensors")
    info, loaded = load(tmp_path / "a.safetensors")
    assert (info.layout, info.config) == ("diffusers", config)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_the_config_beside_a_single_file_counts(tmp_path):
    path = folder(tmp_path, eps=0.01) / "diffusion_pytorch_model.safetensors"
    info = inspect(path)
    assert (info.config.num_heads, info.config.eps) == (4, 0.01) and info.config == inspect(tmp_path).config
    usual = folder(tmp_path / "usual")
    assert not same(load_backbone(path, "wan"), load_backbone(usual, "wan"))
    convert(path, tmp_path / "out.safetensors", "wan")
    (tmp_path / "config.json").unlink()
    assert inspect(tmp_path / "out.safetensors").config == info.config
    assert inspect(path).config.num_heads == 1


def test_a_config_of_another_model_does_not_count(tmp_path):
    path = folder(tmp_path, num_layers=30, eps=1e-5) / "diffusion_pytorch_model.safetensors"
    info = inspect(path, "wan")
    assert info.config.eps == 1e-6 and "is of another network" in info.warnings[0]
    for words in (json.dumps({"num_attention_heads": 2, "eps": 1e-5}), "no JSON"):  # of a text encoder, say
        (tmp_path / "config.json").write_text(words)
        assert inspect(path, "wan").config.eps == 1e-6 and not inspect(path, "wan").warnings
    with pytest.raises(UserError, match="is not valid JSON"):
        inspect(tmp_path, "wan")


@pytest.mark.parametrize(
    "name, family, guessed",
    [
        ("SkyReelsV2Transformer3DModel", "skyreels", False),
        ("CausalWanTransformer3DModel", "causal", True),
        ("CausalWanModel", "causal", True),
        ("WanTransformer3DModel", "wan", True),
    ],
)
def test_class_names_tell_families(name, family, guessed, tmp_path):
    info = inspect(folder(tmp_path, _class_name=name))
    assert (info.family, info.guessed) == (family, guessed)


def test_a_pipelines_folder_opens_its_transformer(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    folder(tmp_path / "transformer")
    folder(tmp_path / "vae")
    assert inspect(tmp_path, "wan").config.num_heads == 4 and not inspect(tmp_path, "wan").warnings
    folder(tmp_path / "transformer_2")
    assert "transformer_2 is left out" in inspect(tmp_path, "wan").warnings[0]


def test_the_plain_files_are_taken_where_a_variant_lies_beside(tmp_path):
    half = {name: tensor.half() for name, tensor in weights().items()}
    folder(tmp_path, half, "diffusion_pytorch_model.fp16.safetensors")
    assert inspect(tmp_path, "wan").dtype == torch.float16 and not inspect(tmp_path, "wan").warnings
    info = inspect(folder(tmp_path), "wan")
    assert info.dtype == torch.float32
    assert "diffusion_pytorch_model.fp16.safetensors beside it is left out" in info.warnings[0]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_their_variants(kind, tmp_path):
    folder(tmp_path).joinpath("diffusion_pytorch_model.safetensors").unlink()
    for variant, tensors in (("", weights()), (".fp16", {name: t.half() for name, t in weights().items()})):
        places = {}
        for shard, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
            file = f"diffusion_pytorch_model{variant}-{shard:05d}-of-00002.{kind}"
            held = {name: tensors[name] for name in names}
            save_file(held, tmp_path / file) if kind == "safetensors" else torch.save(held, tmp_path / file)
            places |= dict.fromkeys(names, file)
        index = tmp_path / f"diffusion_pytorch_model.{kind}.index{variant}.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert inspect(tmp_path, "wan").dtype == torch.float32 and "left out" in inspect(tmp_path, "wan").warnings[0]
    for variant, dtype in (("", torch.float32), (".fp16", torch.float16)):
        info = inspect(tmp_path / f"diffusion_pytorch_model{variant}-00001-of-00002.{kind}", "wan")
        assert (info.dtype, info.config.num_heads, info.warnings) == (dtype, 4, ())


@pytest.mark.parametrize("kept", [True, False])  # diffusers keeps the separate ones beside
def test_fused_projections_are_split(kept, tmp_path):
    tensors = weights()
    for name in [name for name in tensors if ".attn1.to_q." in name or ".attn2.to_k." in name]:
        letters = "qkv" if "attn1" in name else "kv"
        front, end = name.split(f".to_{letters[0]}.")
        parts = [f"{front}.to_{letter}.{end}" for letter in letters]
        tensors[f"{front}.to_{letters}.{end}"] = torch.cat([tensors[part] for part in parts])
        for part in parts if not kept else ():
            del tensors[part]
    fused, plain = folder(tmp_path / "fused", tensors), folder(tmp_path / "plain")
    assert load(fused, "wan")[1].keys() == load(plain, "wan")[1].keys() and not inspect(fused, "wan").warnings
    assert same(load_backbone(fused, "wan"), load_backbone(plain, "wan"))
    convert(fused, tmp_path / "out.safetensors", "wan")
    assert all(torch.equal(t, load_file(tmp_path / "out.safetensors")[n]) for n, t in load(plain, "wan")[1].items())


def test_the_scale_of_a_fused_fp8_weight_is_that_of_its_parts(tmp_path):
    tensors = weights()
    front = "blocks.0.attn1.to_"
    parts = [tensors.pop(f"{front}{letter}.weight") for letter in "qkv"]
    tensors |= {
        f"{front}qkv.weight": torch.cat(parts).to(torch.float8_e4m3fn),
        f"{front}qkv.scale_weight": torch.ones(()),
    }
    loaded = load(folder(tmp_path, tensors), "wan")[1]
    for letter, part in zip("qkv", parts, strict=True):
        assert torch.equal(loaded[f"blocks.0.self_attn.{letter}.weight"], part.to(torch.float8_e4m3fn))
        assert loaded[f"blocks.0.self_attn.{letter}.scale_weight"] == 1


def test_a_network_without_the_norm_before_the_text_runs(tmp_path):
    path = folder(tmp_path, weights(cross_attn_norm=False), cross_attn_norm=False)
    loaded = load_backbone(path, "wan")
    assert not loaded.info.config.cross_attn_norm and velocity(loaded.backbone).isfinite().all()
    assert not same(loaded, load_backbone(folder(tmp_path / "with"), "wan"))
    convert(path, tmp_path / "out.safetensors", "wan")
    assert inspect(tmp_path / "out.safetensors").config == loaded.info.config
    tensors = weights()
    del tensors["blocks.0.norm2.weight"]
    with pytest.raises(UserError, match="lacks blocks.0.norm3.weight"):
        inspect(folder(tmp_path / "damaged", tensors), "wan")
