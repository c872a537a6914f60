"""Runs in the host's Python: `run_decoders.py host pack` decodes a latent whole and chunk by chunk with each decoder.

Prints, as JSON, for each decoder the shapes of both and their largest difference, all frames and the last ones; what
becomes of a decode that runs out of memory; and of one on the side stream of a pretended device, which copies as late
as it may.
"""

import json
import sys
from functools import cache
from pathlib import Path

from in_host import of_pack

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

import comfy.ldm.wan.vae  # isort: skip
import comfy.ldm.wan.vae2_2  # isort: skip
import torch
from late_device import pretend_streams

core_vae = of_pack("flowcache_core.demo.vae")
host_decode = of_pack("nodes.comfyui.decode")
host_models = of_pack("nodes.comfyui.models")
streams = of_pack("flowcache_core.history.streams")


def stock() -> torch.nn.Module:
    """The host's own Wan VAE, small and random."""
    torch.manual_seed(0)
    return comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])


def deep() -> torch.nn.Module:
    """The host's own Wan 2.2 VAE of 48 channels, small and random."""
    torch.manual_seed(0)
    return comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True])


@cache
def decoded_whole(vae, latent: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return vae.decode(latent)[0]


def compare(decoder, vae, latent: torch.Tensor, chunk: int, side=streams.AT_ONCE) -> dict:
    whole = decoded_whole(vae, latent)
    with torch.inference_mode():
        parts = [decoder(part, side) for part in latent.split(chunk, dim=2)] + [decoder.finish()]
    ours = torch.cat([part.on_cpu() for part in parts if part is not None])
    differences = (ours - whole).abs() if ours.shape == whole.shape else torch.full((1,), float("inf"))
    return {
        "shapes": [list(ours.shape), list(whole.shape)],
        "largest": differences.max().item(),
        "mean": differences.mean().item(),
        "spread": whole.std().item(),
    }


def beside(vae, latent: torch.Tensor, device) -> dict:
    """Decodes a latent on a side stream; also what the device was asked for until the frames are read."""
    decoder, side = host_decode.stream_decoder(vae), streams.SideStream(torch.device("cpu"))
    device.told.clear()
    with torch.inference_mode():
        plain = host_decode.stream_decoder(vae)
        expected = torch.cat([plain(part).on_cpu() for part in latent.split(2, dim=2)])
        with side.beside():
            parts = [decoder(part, side) for part in latent.split(2, dim=2)]
    told, early = list(device.told), sum(part.there for part in parts)
    found = torch.cat([part.on_cpu() for part in parts])
    return {"equal": torch.equal(found, expected), "early": early, "waits": told.count("host waits"), "told": len(told)}


def small() -> torch.nn.Module:
    """The host's small decoder, random."""
    torch.manual_seed(0)
    module = host_decode.TAEHV(latent_channels=16, latent_format=None)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
    return module


def cramped(vae, latent: torch.Tensor, most: int, rooms: int) -> dict:
    """Decodes chunk by chunk where there is no memory for more than so many latent pixels at once after the first
    chunks, and room is made so many times."""
    made, network, first = [], vae.first_stage_model, latent.shape[2] // 2
    decoding = network.decoder.forward

    def forward(x, *args, **more):
        if len(parts) >= first and x.shape[-1] * x.shape[-2] > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return decoding(x, *args, **more)

    def make_room() -> bool:
        made.append(len(made) < rooms)
        return made[-1]

    parts: list = []
    decoder = host_decode.stream_decoder(vae, make_room)
    with torch.inference_mode():
        whole = vae.decode(latent)[0]
        network.decoder.forward = forward
        try:
            for part in [*latent.split(1, dim=2), None]:
                parts.append(decoder.finish() if part is None else decoder(part))
        finally:
            del network.decoder.forward
    ours = torch.cat([part.on_cpu() for part in parts if part is not None])
    apart = (ours - whole).abs()
    return {
        "shapes": [list(ours.shape), list(whole.shape)],
        "mean": apart.mean().item(),
        "before": apart[: 4 * (first - 1) - 3].max().item(),
        "spread": whole.std().item(),
        "tiles": len(decoder.places),
        "rooms": made,
    }


def main() -> None:
    demo = host_models.video_vae(core_vae.load_vae())
    wan, deeper = host_models.video_vae(stock()), host_models.video_vae(deep(), 48)
    for vae in (wan, deeper):
        for name, weight in vae.first_stage_model.named_parameters():  # the host's layers leave theirs as memory had it
            if name.endswith("bias"):
                torch.nn.init.zeros_(weight)
            elif not name.endswith("gamma"):
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    latent = torch.randn(1, 16, 7, 4, 4, generator=torch.Generator().manual_seed(1))
    small_latent = torch.randn(1, 48, 7, 2, 2, generator=torch.Generator().manual_seed(1))
    results = {}
    for chunk in (1, 2, 3):
        results[f"demo {chunk}"] = compare(host_decode.stream_decoder(demo), demo, latent, chunk)
        results[f"wan {chunk}"] = compare(host_decode.stream_decoder(wan), wan, latent, chunk)
        results[f"deep {chunk}"] = compare(host_decode.stream_decoder(deeper), deeper, small_latent, chunk)
        results[f"overlap {chunk}"] = compare(host_decode.OverlapDecoder(demo), demo, latent, chunk)
    wide = torch.randn(1, 16, 4, 4, 64, generator=torch.Generator().manual_seed(2))
    results["cramped"] = cramped(wan, wide, most=4 * 24, rooms=2)
    deep_wide = torch.randn(1, 48, 4, 4, 64, generator=torch.Generator().manual_seed(2))
    results["deep cramped"] = cramped(deeper, deep_wide, most=4 * 24, rooms=2)
    if host_decode.TAEHV is not None:
        tae = host_models.video_vae(small())
        tae.process_output = lambda image: image
        for chunk in (1, 2, 3):
            results[f"small {chunk}"] = compare(host_decode.stream_decoder(tae), tae, latent, chunk)
    device = pretend_streams(streams, setattr)
    for name, vae in {
        "demo": demo,
        "wan": wan,
        "deep": deeper,
        **({} if host_decode.TAEHV is None else {"small": tae}),
    }.items():
        results[f"{name} beside"] = beside(vae, small_latent if name == "deep" else latent, device)
    results["classes"] = [type(host_decode.stream_decoder(vae)).__name__ for vae in (demo, wan, deeper)]
    print("RESULT " + json.dumps(results))


main()
