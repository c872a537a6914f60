"""LongLive from the command line: a run that goes on with another prompt is the one that did not stop."""

import torch
from safetensors.torch import load_file, save_file

from flowcache_core.__main__ import main
from flowcache_core.models.latent_spaces import statistics_of
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


def test_a_video_of_several_shots_in_two_runs(tmp_path, capsys):
    network = stamped(tmp_path / "longlive2.safetensors", "longlive 2")
    width = load_file(network)["text_embedding.0.weight"].shape[1]
    save_file({"embedding": normal("text.cond", (1, 8, width))}, tmp_path / "cond.st")
    fixed = "--width 64 --height 64 --window 32 --sink 8 --preset off --dtype float32".split()

    def generate(out: str, chunks: int, *more: str) -> torch.Tensor:
        words = ["generate", "--network", str(network), "--chunks", str(chunks), "--out", str(tmp_path / out)]
        assert main([*words, *fixed, "--text", str(tmp_path / "cond.st"), *more]) == 0, capsys.readouterr().err
        return load_file(tmp_path / out)["latent_tensor"]

    whole = generate("whole.latent", 5, "--shots", "1", "4")
    assert "a new shot begins with chunk 1, 4" in capsys.readouterr().out
    assert whole.shape == (1, 48, 40, 4, 4)
    state = str(tmp_path / "state.safetensors")
    generate("begun.latent", 3, "--shots", "1", "--save-state", state)
    assert torch.equal(generate("after.latent", 2, "--shots", "4", "--state", state), whole)
    assert not torch.equal(generate("one.latent", 5), whole)
    mean, deviation = statistics_of(48)
    assert abs(((whole - mean) / deviation).std().item() - 1) < 0.5  # in the scale of Wan 2.2's VAE


def test_a_start_image_is_what_the_first_chunk_begins_with(tmp_path, capsys):
    network = stamped(tmp_path / "longlive2.safetensors", "longlive 2")
    width = load_file(network)["text_embedding.0.weight"].shape[1]
    save_file({"embedding": normal("text.cond", (1, 8, width))}, tmp_path / "cond.st")
    image = normal("image", (1, 48, 1, 4, 4))
    save_file({"latent_tensor": image}, tmp_path / "image.latent")
    fixed = "--family auto --width 64 --height 64 --window 32 --sink 8 --preset off --dtype float32 --text".split()

    def generate(out: str, chunks: int, *more: str) -> torch.Tensor:
        words = ["generate", "--network", str(network), "--chunks", str(chunks), "--out", str(tmp_path / out)]
        assert main([*words, *fixed, str(tmp_path / "cond.st"), *more]) == 0, capsys.readouterr().err
        return load_file(tmp_path / out)["latent_tensor"]

    begun = ["--prefix", str(tmp_path / "image.latent")]
    found = generate("a.latent", 3, *begun)
    assert found.shape == (1, 48, 24, 4, 4) and torch.allclose(found[:, :, :1], image, atol=1e-5)
    kept = [*begun, "--resume", str(tmp_path / "runs")]
    for _ in range(2):  # the second one finds all chunks there
        assert torch.equal(generate("b.latent", 3, *kept), found)
