"""What a file is, and what is said of files that are something else."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowcache_core.checkpoints import CAUSAL_FAMILIES, convert, inspect, load, weight_files
from flowcache_core.checkpoints.weight_files import open_weights
from flowcache_core.demo.shipped import NETWORK_FILE
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanConfig, WanNetwork
from tests.helpers.paths import ROOT

CONFIG = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, text_dim=40)


def weights(config: WanConfig = CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach() for name, tensor in WanNetwork(config).state_dict().items()}


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def refused(match: str, path: Path, **options) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) - len(str(path)) < 400


def test_plain_wan_warns(tmp_path):
    info = inspect(saved(tmp_path / "rolling_skyreels_magi.safetensors", weights()))
    assert (info.family, info.config, info.layout, info.dtype) == ("wan", CONFIG, "wan", torch.float32)
    assert len(info.warnings) == 1
    for choice in ("causal", "skyreels", "rolling"):
        assert choice in info.warnings[0]


@pytest.mark.parametrize("family", ["causal", "skyreels", "rolling", "wan"])
def test_users_choice_wins(tmp_path, family):
    path = saved(tmp_path / "a.safetensors", weights())
    info = inspect(path, family)
    assert info.family == family and not info.warnings


def test_a_choice_against_what_the_file_says_is_told(tmp_path):
    stamped = saved(tmp_path / "a.safetensors", weights(), {"flowcache": '{"family": "rolling"}'})
    assert not inspect(stamped, "rolling").warnings
    (told,) = inspect(stamped, "skyreels").warnings
    assert "says that it is rolling, and is run as skyreels" in told
    flagged = saved(tmp_path / "b.safetensors", weights(), {"config": '{"transformer": {"causal_ar": true}}'})
    assert not inspect(flagged, "causvid").warnings and inspect(flagged, "wan").warnings


def test_the_demo_model_is_nothing_else():
    refused("demo model's stamp, so it cannot be 'skyreels'; choose demo", NETWORK_FILE, family="skyreels")


def test_impossible_choice(tmp_path):
    plain = saved(tmp_path / "a.safetensors", weights())
    refused("cannot be 'magi'; choose causal or", plain, family="magi")
    refused("unknown; choose auto", plain, family="cosmos")
    fps = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=1, text_dim=40, fps=True)
    refused("fps embedding, so it cannot be 'causal'", saved(tmp_path / "b.safetensors", weights(fps)), family="causal")


def test_fps_is_skyreels(tmp_path):
    config = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=1, text_dim=40, fps=True)
    info = inspect(saved(tmp_path / "a.safetensors", weights(config)))
    assert (info.family, info.config) == ("skyreels", config)


def test_metadata_tells_causal_and_heads(tmp_path):
    metadata = {"config": json.dumps({"transformer": {"causal_ar": True, "num_heads": 4}})}
    info = inspect(saved(tmp_path / "a.safetensors", weights(), metadata))
    assert info.family == "causal"
    assert info.config.num_heads == 4


def test_heads_that_do_not_divide(tmp_path):
    config = WanConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=1, text_dim=40)
    refused("width 48 and 0 heads", saved(tmp_path / "a.safetensors", weights(config)))


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "model._fsdp_wrapped_module."]
)
def test_prefixes(tmp_path, prefix):
    tensors = weights()
    path = saved(tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in tensors.items()})
    info, loaded = load(path)
    assert info.prefix == prefix
    assert loaded.keys() == tensors.keys()


def test_all_in_one_checkpoint(tmp_path):
    tensors = {"model.diffusion_model." + name: tensor for name, tensor in weights().items()}
    tensors["first_stage_model.decoder.conv1.weight"] = torch.zeros(3)
    assert load(saved(tmp_path / "a.safetensors", tensors))[1].keys() == weights().keys()


@pytest.mark.parametrize("wrapper", ["generator_ema", "generator"])
@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module."])
def test_torch_files(tmp_path, wrapper, prefix):
    tensors = weights()
    torch.save({wrapper: {prefix + name: tensor for name, tensor in tensors.items()}, "step": 3}, tmp_path / "a.pt")
    info, loaded = load(tmp_path / "a.pt")
    assert info.family == "causal" and "rolling" in info.warnings[0]
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_torch_file_with_both(tmp_path):
    tensors = weights()
    both = {"generator": {n: t + 1 for n, t in tensors.items()}, "generator_ema": tensors}
    torch.save(both, tmp_path / "a.pt")
    name = "head.head.weight"
    assert torch.equal(load(tmp_path / "a.pt")[1][name], tensors[name])
    assert torch.equal(load(tmp_path / "a.pt", use_ema=False)[1][name], tensors[name] + 1)


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    names, places = list(tensors), {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[shard::3]}, folder / file)
        places |= dict.fromkeys(names[shard::3], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards(tmp_path):
    tensors = weights()
    index = sharded(tmp_path / "model", tensors)
    shard = index.parent / "model-00001-of-00003.safetensors"
    for path in (index, index.parent, shard):
        info, loaded = load(path)
        assert info.bytes == sum(file.stat().st_size for file in index.parent.glob("*.safetensors"))
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    told = index.read_text()
    index.unlink()
    for path in (index.parent, shard):  # as SkyReels-V2's own loader takes every file of a folder
        assert load(path)[1].keys() == tensors.keys()
    index.write_text(told)
    (index.parent / "model-00002-of-00003.safetensors").unlink()
    refused("model-00002-of-00003.safetensors, which is not beside it", index)
    index.unlink()
    refused("one shard of several", shard)


def test_shards_stay_in_their_folder(tmp_path):
    index = sharded(tmp_path / "model", weights())
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused("expected a file beside it", index)


def test_folder_with_config(tmp_path):
    saved(tmp_path / "model.safetensors", weights())
    (tmp_path / "config.json").write_text(json.dumps({"dim": 128, "num_heads": 2, "inject_sample_info": False}))
    info = inspect(tmp_path)
    assert (info.family, info.config.num_heads) == ("skyreels", 2)
    assert not info.warnings


def test_folders_that_do_not_tell(tmp_path):
    refused("holds no .safetensors", tmp_path)
    saved(tmp_path / "a.safetensors", weights())
    saved(tmp_path / "b.safetensors", weights())
    refused("2 files .*expected one", tmp_path)


def test_fp8_scales_are_kept(tmp_path):
    tensors = weights()
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    tensors["blocks.0.ffn.0.scale_weight"] = torch.ones(())
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = saved(tmp_path / "a.safetensors", tensors)
    assert load(path)[1].keys() == tensors.keys()
    with pytest.raises(UserError, match="scaled fp8"):
        convert(path, tmp_path / "b.safetensors", "causal", torch.bfloat16)
    convert(path, tmp_path / "b.safetensors", "causal")
    assert load(tmp_path / "b.safetensors")[1]["scaled_fp8"].dtype == torch.float8_e4m3fn


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_pickles_are_never_opened(tmp_path, name):
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
    refused("is a pickle, which can run code", tmp_path / name)
    torch.save({"generator": Trap(sprung)}, tmp_path / name)
    refused("no torch file of plain tensors", tmp_path / name)
    assert not sprung.exists()


@pytest.mark.parametrize("first", [0x80, 0x3C])
def test_a_header_whose_length_looks_like_another_kind_of_file(tmp_path, first):
    """The first byte is the header length's lowest: it may be a pickle's or a web page's."""
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={"note": ""})
    raw = path.read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip()
    length = next(n for n in range(first, 10_000, 256) if n >= len(header))
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + raw[-8:])
    assert list(open_weights(path).tensors) == ["x"]


def test_a_file_that_is_larger_than_memory(tmp_path, monkeypatch):
    """Linux maps no more in one piece than there is memory and swap; torch says so in a RuntimeError."""

    def refuse(path, framework):
        raise RuntimeError("unable to mmap 28577000000 bytes from file <a>: Cannot allocate memory (12)\nmore")

    path = saved(tmp_path / "a.safetensors", weights())
    monkeypatch.setattr(weight_files, "safe_open", refuse)
    refused("cannot be mapped .*Cannot allocate memory.*use shards", path)
    assert inspect(path).config == CONFIG  # names and shapes are read without the weights


def test_cut_short_anywhere(tmp_path):
    whole = saved(tmp_path / "whole.safetensors", weights()).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in (0, 5, 9, 100, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("cut short|has . bytes", path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GGUF" + bytes(40), "a GGUF file; load it with"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "a zip but no torch file"),
        (b"hello, this is a text file that goes on", "does not begin like a safetensors file"),
        ((12).to_bytes(8, "little") + b"{not json   ", "broken safetensors header"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "broken safetensors header"),
        ((2).to_bytes(8, "little") + b"{}", "holds 0 tensors"),
    ],
)
def test_other_files(tmp_path, content, match):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(match, path)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "a LoRA; load it with"),
        (["decoder.conv1.weight"], "a VAE; load it with"),
        (["token_embedding.weight"], "a text encoder"),
        (["double_blocks.0.img_attn.proj.weight"], "holds 1 tensors like double_blocks"),
    ],
)
def test_other_models(tmp_path, names, match):
    refused(match, saved(tmp_path / "a.safetensors", {name: torch.zeros(2) for name in names}))


def test_missing_and_misshapen(tmp_path):
    tensors = weights()
    wrong = tensors | {"blocks.1.ffn.2.bias": torch.zeros(3)}
    refused(r"blocks.1.ffn.2.bias of shape \[3\], expected \[128\]", saved(tmp_path / "a.safetensors", wrong))
    tensors.pop("blocks.0.self_attn.q.weight")
    refused("lacks blocks.0.self_attn.q.weight", saved(tmp_path / "b.safetensors", tensors))
    refused("does not exist", tmp_path / "c.safetensors")


def test_broken_metadata(tmp_path):
    refused("metadata 'config'", saved(tmp_path / "a.safetensors", weights(), {"config": "{"}))
    refused("broken 'flowcache' stamp", saved(tmp_path / "b.safetensors", weights(), {"flowcache": "causal"}))
    refused("stamped 'later'", saved(tmp_path / "c.safetensors", weights(), {"flowcache": '{"family": "later"}'}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path, value):
    tensors = weights()
    tensors["blocks.1.ffn.0.weight"][3, 4] = value
    path = saved(tmp_path / "a.safetensors", tensors)
    assert inspect(path).config == CONFIG
    refused("NaN or infinity in blocks.1.ffn.0.weight", path, check_finite=True)
    with pytest.raises(UserError, match="NaN or infinity"):
        convert(path, tmp_path / "b.safetensors", "causal")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("family", ["causal", "skyreels", "rolling", "wan"])
def test_convert_stamps(tmp_path, family):
    tensors = weights()
    torch.save({"generator_ema": {"model." + name: tensor for name, tensor in tensors.items()}}, tmp_path / "a.pt")
    seen = []
    info = convert(tmp_path / "a.pt", tmp_path / "b.safetensors", family, progress=lambda *at: seen.append(at))
    assert info.family == family and info.config == CONFIG and not info.warnings
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:  # as ComfyUI reads it
        assert set(file.keys()) == tensors.keys()
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
        transformer = json.loads(file.metadata()["config"])["transformer"]
    assert transformer == {"text_dim": 40} | ({"causal_ar": True} if family in CAUSAL_FAMILIES else {})


def test_convert_wants_a_family(tmp_path):
    path = saved(tmp_path / "a.safetensors", weights())
    with pytest.raises(UserError, match="must be named"):
        convert(path, tmp_path / "b.safetensors")
    convert(path, tmp_path / "b.safetensors", "rolling")
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors").family == "rolling"  # stamped by now


def test_convert_casts_matrices(tmp_path):
    path = saved(tmp_path / "a.safetensors", weights())
    info = convert(path, tmp_path / "b.safetensors", "causal", torch.bfloat16)
    assert info.dtype == torch.bfloat16
    assert load(tmp_path / "b.safetensors")[1]["head.head.bias"].dtype == torch.float32
    assert info.bytes < 0.55 * path.stat().st_size


@pytest.mark.parametrize("value, dtype", [(1e5, torch.float16), (449.0, torch.float8_e4m3fn), (6e4, torch.float8_e5m2)])
def test_convert_writes_no_overflow(value, dtype, tmp_path):
    """float16 would hold infinity there, e4m3fn its largest number, and neither would be noticed."""
    tensors = weights()
    tensors["blocks.1.ffn.0.weight"][3, 4] = -value
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=f"blocks.1.ffn.0.weight goes up to {value:g}, and {dtype} holds"):
        convert(path, tmp_path / "b.safetensors", "causal", dtype)
    assert list(tmp_path.iterdir()) == [path]
    assert convert(path, tmp_path / "b.safetensors", "causal", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint64", "float4_e2m1fn_x2"]
)
def test_scales_of_newer_types_are_written_as_they_are(name, tmp_path):
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    dtype = getattr(torch, name)
    scale = torch.arange(1, 1 + 12 * dtype.itemsize, dtype=torch.uint8).view(3, -1).view(dtype)
    path = saved(tmp_path / "a.safetensors", weights() | {"blocks.0.ffn.0.weight_scale": scale})
    load(path, check_finite=True)
    convert(path, tmp_path / "b.safetensors", "causal")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        read = file.get_tensor("blocks.0.ffn.0.weight_scale")
    assert read.dtype == dtype and torch.equal(read.view(torch.uint8), scale.view(torch.uint8))


def test_types_that_cannot_be_read_or_run(tmp_path):
    header = json.dumps({"x": {"dtype": "F6_E3M2", "shape": [4, 8], "data_offsets": [0, 24]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    refused("cannot be read .*F6_E3M2.*another type", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="cannot be read .*F6_E3M2.*another type"):
        inspect(tmp_path / "a.safetensors")
    packed = weights()
    name = "blocks.0.self_attn.q.weight"
    packed[name] = torch.zeros(128, 64, dtype=torch.uint8)
    refused(f"has {name} packed in 4 bits", saved(tmp_path / "b.safetensors", packed))
    torch.save(weights() | {"blocks.0.ffn.0.weight_scale": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="is of torch.complex128, which safetensors does not hold"):
        convert(tmp_path / "c.pt", tmp_path / "c.safetensors", "causal")


def test_convert_leaves_nothing_half_written(tmp_path):
    path = saved(tmp_path / "a.safetensors", weights())

    def cancel(written, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "b.safetensors", "causal", progress=cancel)
    assert list(tmp_path.iterdir()) == [path]
    for out, match in (
        (path, "exists already"),
        (tmp_path / "b.pt", "only as .safetensors"),
        (path / "b.safetensors", "choose a folder"),
    ):
        with pytest.raises(UserError, match=match):
            convert(path, out, "causal")


MEASURE = """
import sys, torch
from flowcache_core.models.wan import WanNetwork
from flowcache_core.checkpoints import load, convert

def resident():
    with open("/proc/self/status") as status:
        return [int(line.split()[1]) for line in status if line.startswith("VmHWM")][0]

load(sys.argv[2])  # warms up the modules
before = resident()
info, tensors = load(sys.argv[1])
with torch.device("meta"):
    network = WanNetwork(info.config)
network.load_state_dict(tensors, assign=True)
assert sum(float(weight.sum()) for weight in network.parameters()) == 0.0
loading = resident() - before
del network, tensors
convert(sys.argv[1], sys.argv[3], "causal")
print(loading * 1024, (resident() - before) * 1024)
"""


def sparse(path: Path, shapes: dict[str, torch.Size]) -> int:
    """Writes a bfloat16 safetensors file of zeros that takes no room on disk; returns its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_large_file(tmp_path):
    small = saved(tmp_path / "small.safetensors", weights())
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in WanNetwork(config).state_dict().items()}
    path = tmp_path / "large.safetensors"
    size = sparse(path, shapes)
    assert size > 150e6
    command = [sys.executable, "-c", MEASURE, path, small, tmp_path / "out.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loading, both = map(int, done.stdout.split())
    assert 0.9 * size < loading <= both <= 1.1 * size  # every weight was read, and none of them twice
