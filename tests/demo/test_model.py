"""What ships: small enough, whole, and read by ourselves as what it is; and how training exports it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowcache_core import generate
from flowcache_core.checkpoints import inspect, stamp
from flowcache_core.demo import NETWORK_FILE, VAE_FILE, decode, embed_caption, load_network
from flowcache_core.demo.export import export
from flowcache_core.demo.train_network import CONFIG
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanNetwork
from flowcache_core.settings import OFF, Between, Every, Settings
from flowcache_core.solvers.multistep import DPM2M, UniPC
from flowcache_core.solvers.one_step import Euler


def trained(path, spoil=None):
    """A training checkpoint of random weights."""
    weights = WanNetwork(CONFIG).state_dict()
    if spoil is not None:
        weights["head.head.weight"][0, 0] = spoil
    torch.save({"average": weights, "step": 12, "seconds": 90.0}, path)
    return weights


def test_what_ships_is_small_and_read_as_causal():
    assert NETWORK_FILE.stat().st_size + VAE_FILE.stat().st_size <= 24e6
    info = inspect(NETWORK_FILE)
    assert (info.family, info.config, info.dtype, info.warnings) == ("demo", CONFIG, torch.float16, ())
    with safe_open(NETWORK_FILE, "pt") as file:
        settings = json.loads(file.metadata()["config"])
    assert settings == {"transformer": {"causal_ar": True, "num_heads": 4, "text_dim": 64}}


def test_what_ships_runs():
    result = generate(load_network(), embed_caption("a red circle"), 2, steps=4, lag=2)
    pixels = decode(result.latents, 3)
    assert pixels.shape == (3, 21, 64, 64) and pixels.abs().max() <= 1
    assert (decode(result.latents, 6) - pixels).abs().max() < 1e-3  # chunk by chunk is the same as at once


def test_export_keeps_the_weights(tmp_path):
    torch.manual_seed(0)
    weights = trained(tmp_path / "trained.pt")
    out = export(tmp_path / "trained.pt", tmp_path / "new" / "network.safetensors")
    assert export(tmp_path / "trained.pt", out) == out  # an older file is replaced
    network = load_network(out).network.state_dict()
    assert network.keys() == weights.keys()
    assert all((network[name] - weights[name]).abs().max() < 1e-3 for name in weights)
    assert {weight.dtype for weight in network.values()} == {torch.float32}


def test_spoiled_training_is_not_exported(tmp_path):
    for spoil in (float("nan"), 1e6):
        trained(tmp_path / "trained.pt", spoil)
        with pytest.raises(UserError, match="head.head.weight.*train again"):
            export(tmp_path / "trained.pt", tmp_path / "network.safetensors")
    (tmp_path / "trained.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match="no checkpoint of train_network"):
        export(tmp_path / "trained.pt", tmp_path / "network.safetensors")
    assert not (tmp_path / "network.safetensors").exists()


def test_networks_of_other_families_are_told(tmp_path):
    info = replace(inspect(NETWORK_FILE), family="causal")
    save_file(load_file(NETWORK_FILE), tmp_path / "other.safetensors", stamp(info))
    with pytest.raises(UserError, match="family 'causal', expected 'demo'"):
        load_network(tmp_path / "other.safetensors")


@pytest.mark.parametrize("solver", [Euler, DPM2M, UniPC])
def test_correction_leads_nearer_to_the_plain_run(solver):
    """Whatever takes the steps: on a trained network, whose flow is smooth."""
    network, caption = load_network(), embed_caption("a red circle and a blue square")

    def latents(settings: Settings) -> torch.Tensor:
        return generate(network, caption, 2, steps=24, lag=6, settings=settings, solver=solver).latents

    plain = latents(OFF)

    def error(correct: bool) -> float:
        return (latents(Settings(Every(3, least=6), Between(correct=correct))) - plain).square().mean().item()

    assert error(correct=True) < 0.9 * error(correct=False)
