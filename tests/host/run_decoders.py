"""Runs in the host's Python: `run_decoders.py host pack` decodes a latent whole and chunk by chunk with each decoder.

Prints, as JSON, for each decoder the shapes of both and their largest difference, all frames and the last ones.
"""

import json

from in_host import of_pack

import comfy.ldm.wan.vae  # isort: skip
import torch

core_vae = of_pack("flowcache_core.demo.vae")
host_decode = of_pack("nodes.comfyui.decode")
host_models = of_pack("nodes.comfyui.models")


def stock() -> torch.nn.Module:
    """The host's own Wan VAE, small and random."""
    torch.manual_seed(0)
    return comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])


def compare(decoder, vae, latent: torch.Tensor, chunk: int) -> dict:
    with torch.inference_mode():
        whole = vae.decode(latent)[0]
        parts = [decoder(part) for part in latent.split(chunk, dim=2)] + [decoder.finish()]
    ours = torch.cat([part for part in parts if part is not None])
    differences = (ours - whole).abs() if ours.shape == whole.shape else torch.full((1,), float("inf"))
    return {
        "shapes": [list(ours.shape), list(whole.shape)],
        "largest": differences.max().item(),
        "mean": differences.mean().item(),
        "spread": whole.std().item(),
    }


def main() -> None:
    demo = host_models.video_vae(core_vae.load_vae())
    wan = host_models.video_vae(stock())
    for name, weight in wan.first_stage_model.named_parameters():  # the host's layers leave theirs as memory had it
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
        elif not name.endswith("gamma"):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    latent = torch.randn(1, 16, 10, 4, 4, generator=torch.Generator().manual_seed(1))
    results = {}
    for chunk in (1, 2, 3):
        results[f"demo {chunk}"] = compare(host_decode.stream_decoder(demo), demo, latent, chunk)
        results[f"wan {chunk}"] = compare(host_decode.stream_decoder(wan), wan, latent, chunk)
        results[f"overlap {chunk}"] = compare(host_decode.OverlapDecoder(demo), demo, latent, chunk)
    results["classes"] = [type(host_decode.stream_decoder(vae)).__name__ for vae in (demo, wan)]
    print("RESULT " + json.dumps(results))


main()
