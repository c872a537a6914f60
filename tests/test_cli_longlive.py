"""LongLive from the command line: a run that goes on with another prompt is the one that did not stop."""

import torch
from safetensors.torch import load_file, save_file

from flowcache_core.__main__ import main
from tests.helpers.magi_weights import normal
from tests.test_cli import stamped

FIXED = "--family longlive --width 64 --height 64 --window 12 --sink 3 --preset off --dtype float32".split()


def test_goes_on_from_a_state_with_another_prompt(tmp_path, capsys):
    network = stamped(tmp_path / "longlive.safetensors", "longlive")
    width = load_file(network)["text_embedding.0.weight"].shape[1]
    for name in ("cond", "other"):
        save_file({"embedding": normal(f"text.{name}", (1, 8, width))}, tmp_path / f"{name}.st")

    def generate(out: str, chunks: int, texts: list[str], *more: str) -> torch.Tensor:
        words = ["generate", "--network", str(network), "--chunks", str(chunks), "--out", str(tmp_path / out)]
        words += [*FIXED, "--text", *(str(tmp_path / f"{text}.st") for text in texts), *more]
        assert main(words) == 0, capsys.readouterr().err
        return load_file(tmp_path / out)["latent_tensor"]

    whole = generate("whole.latent", 10, ["cond", "other"])
    assert "computed anew for the prompt of chunk 5" in capsys.readouterr().out
    state = str(tmp_path / "state.safetensors")
    generate("begun.latent", 5, ["cond"], "--save-state", state)
    assert torch.equal(generate("after.latent", 5, ["other"], "--state", state), whole)
