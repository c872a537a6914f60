"""Runs in the host's Python: `run_several_devices.py host pack` has the host divide branches of guidance among devices.

Both devices are the CPU under two names, each with a network of its own; their work goes through the host's threads.
Prints, as JSON, how far every run is from one on a single device, for each way that chunks see each other, and how many
calls of a network came from another device's thread.
"""

import json
import threading
from dataclasses import replace

from in_host import of_pack

import comfy.model_patcher  # isort: skip
import comfy.samplers  # isort: skip
import comfy.sd  # isort: skip
import torch

patch = of_pack("nodes.comfyui.patch")
presets = of_pack("flowcache_core.models.presets")
sampler = of_pack("nodes.comfyui.sampler")
settings = of_pack("flowcache_core.settings")
shipped = of_pack("flowcache_core.demo")

DEVICES = torch.device("cpu"), torch.device("cpu", 0)
RUNS = 20
LEVELS = torch.tensor([1.0, 0.7, 0.0])
SEEN = {  # how chunks see each other, and settings
    "causal": ("causal", 2, settings.OFF),
    "causal, budget": ("causal", 1, replace(settings.OFF, history=settings.HistorySettings(1))),
    "rolling": ("rolling", 1, settings.OFF),
    "joint": ("joint", 1, settings.OFF),
}


def load():
    return comfy.sd.load_diffusion_model(str(shipped.NETWORK_FILE), model_options={"dtype": torch.float32})


def divided(model, other):
    """The model with its copy on another device, as the host's node prepares it."""
    model, other = model.clone(), other.clone()
    other.load_device, other.is_multigpu_base_clone = DEVICES[1], True
    model.set_additional_models("multigpu", [other])
    return model


def run(model, seeing: str, lag: int, chosen) -> torch.Tensor:
    ours = sampler.ARSampler(chunk_frames=1, lag=lag, solver="euler", seeing=seeing)
    guider = comfy.samplers.CFGGuider(patch.patched(model, chosen, "test"))
    texts = (shipped.embed_caption(caption) for caption in ("a red circle", ""))
    guider.set_conds(*([[text, {}]] for text in texts))
    guider.set_cfg(3.0)
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return guider.sample(noise, torch.zeros_like(noise), ours, LEVELS, disable_pbar=True, seed=2)


def watch(network, calls: list) -> None:
    network.blocks[0].self_attn.q.register_forward_pre_hook(lambda *_: calls.append(threading.get_ident()))


first, second = load(), load()
both = divided(first, second)
calls: tuple[list, list] = ([], [])
for patcher, seen in zip((first, second), calls, strict=True):
    watch(patcher.model.diffusion_model, seen)
result = {}
for name, asked in SEEN.items():
    alone = run(first, *asked)
    apart, mixed, shares = [], 0, []
    for _ in range(RUNS // len(SEEN) * 2):
        for seen in calls:
            seen.clear()
        apart.append((run(both, *asked) - alone).abs().max().item())
        threads = [set(seen) for seen in calls]
        mixed += len(threads[0] & threads[1]) + sum(len(own) != 1 for own in threads)
        shares.append([len(seen) for seen in calls])
    result[name] = {"apart": max(apart), "mixed": mixed, "shares": shares}
print("RESULT " + json.dumps(result))
