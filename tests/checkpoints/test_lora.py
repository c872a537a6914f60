"""A LoRA that `convert` merges into a network."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core.__main__ import main
from flowcache_core.checkpoints import convert, inspect
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanConfig
from tests.helpers import golden_weights
from tests.helpers.magi_weights import normal

LAYERS = ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
RANK = 4
# One head of 128: without metadata a network's head count follows from its width.
CONFIG = WanConfig(dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=24)


@pytest.fixture
def base(tmp_path):
    """As LongLive publishes its own."""
    weights = {f"model.{name}": weight for name, weight in golden_weights.network(CONFIG).state_dict().items()}
    torch.save({"generator": weights}, tmp_path / "longlive_base.pt")
    return tmp_path / "longlive_base.pt"


def factors(name: str = "base_model.model.{}.lora_{}.weight") -> dict:
    """Of some layers of each block, named as peft names them."""
    made, weights = {}, golden_weights.network(CONFIG).state_dict()
    for layer in (f"blocks.{block}.{one}" for block in range(2) for one in LAYERS):
        wide, narrow = weights[f"{layer}.weight"].shape
        made[name.format(layer, "A")] = normal(f"{layer}.down", (RANK, narrow)).contiguous()
        made[name.format(layer, "B")] = normal(f"{layer}.up", (wide, RANK)).contiguous()
    return made


def expected(scale: float) -> dict:
    weights = golden_weights.network(CONFIG).state_dict()
    for layer in (f"blocks.{block}.{one}" for block in range(2) for one in LAYERS):
        wide, narrow = weights[f"{layer}.weight"].shape
        product = normal(f"{layer}.up", (wide, RANK)) @ normal(f"{layer}.down", (RANK, narrow))
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * product
    return weights


def check(out, scale: float = 1.0) -> None:
    found = load_file(out)
    for name, weight in expected(scale).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)
    assert inspect(out).family == "longlive"


def test_as_upstream_publishes_it(base, tmp_path, capsys):
    torch.save({"generator_lora": factors(), "critic_lora": factors(), "step": 3000}, tmp_path / "lora.pt")
    words = ["convert", str(base), str(tmp_path / "out.safetensors"), "--family", "longlive", "--weights", "generator"]
    assert main([*words, "--lora", str(tmp_path / "lora.pt")]) == 0
    check(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.{}.lora_{}.weight",
        "base_model.model.model.{}.lora_{}.default.weight",
        "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{}.lora_{}.weight",
    ],
)
def test_other_names_and_an_alpha(base, tmp_path, name):
    whole = factors(name)
    alphas = {key.split(".lora_")[0] + ".alpha": torch.tensor(RANK / 2) for key in whole}
    save_file(whole | alphas, tmp_path / "lora.safetensors")
    convert(base, tmp_path / "out.safetensors", "longlive", lora=tmp_path / "lora.safetensors")
    check(tmp_path / "out.safetensors", 0.5)


FIRST = "base_model.model.blocks.0.self_attn.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made | {"blocks.0.other": torch.zeros(2)}, "give a LoRA"),
        (lambda made: made | {FIRST: torch.zeros(RANK, 5)}, "which is"),
        (lambda made: made | {FIRST: torch.full((RANK, 128), torch.nan)}, "NaN or infinity"),
        (lambda made: {name: one for name, one in made.items() if name != FIRST}, "expected both factors"),
        (lambda made: {name.replace("blocks.1", "blocks.9"): one for name, one in made.items()}, "does not have"),
    ],
)
def test_what_is_no_lora_of_the_network(base, tmp_path, change, words):
    save_file(change(factors()), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words):
        convert(base, tmp_path / "out.safetensors", "longlive", lora=tmp_path / "lora.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
