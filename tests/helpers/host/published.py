"""Small random models under the names of the published files, so that the shipped workflows find what they ask for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowcache_core.checkpoints import STAMP, magi_files
from flowcache_core.demo import VAE_FILE
from flowcache_core.media.video import save_video
from flowcache_core.models.wan import WanConfig
from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.graph import random_network, write_network
from tests.helpers.host.longvie_models import write_longvie
from tests.helpers.host.magi_models import VAE, network_of, tokens, vae_alone

# One head of 128: without metadata a network's head count follows from its width.
NETWORK = WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=64)
DEEP = replace(NETWORK, in_dim=48, out_dim=48)
SKYREELS = "Wan2_1-SkyReels-V2-DF-1_3B-540P_fp32.safetensors"
SKYREELS_14B = "Wan2_1-SkyReels-V2-DF-14B-720P_fp16.safetensors"


def write_published(base: Path) -> None:
    """Fills the models and input folders of a server."""
    networks = base / "models" / "diffusion_models"
    write_network(networks / SKYREELS, random_network(3, replace(NETWORK, fps=True)), NETWORK)
    write_network(networks / "causal_forcing-framewise.safetensors", random_network(4, NETWORK), NETWORK)
    write_network(networks / "longlive_1.3b.safetensors", random_network(7, NETWORK), NETWORK)
    write_network(networks / SKYREELS_14B, random_network(6, NETWORK), NETWORK)
    for name in ("self_forcing_dmd.pt", "rolling_forcing_dmd.pt", "causvid.pt", "rewardforcing.pt"):
        weights = {f"model.{key}": weight for key, weight in random_network(5, NETWORK).items()}
        torch.save({"generator_ema": weights}, networks / name)
    weights = {f"model.{key}": weight for key, weight in random_network(8, NETWORK).items()}
    save_file(weights, networks / "krea-realtime-video-14b.safetensors")
    for seed, level in ((10, "high"), (11, "low")):
        stamp = {STAMP: json.dumps({"family": "experts"})}
        save_file(random_network(seed, NETWORK), networks / f"sfwan2.2_a14b_{level}_noise.safetensors", stamp)
    weights = {f"model.{key}": weight for key, weight in random_network(9, DEEP).items()}
    torch.save({"generator": weights}, networks / "model_bf16.pt")
    (base / "models" / "vae" / "wan2.2_vae.safetensors").touch()  # listed, never read: the real one has 1.4 GB
    write_longvie(networks)
    image_encoders = base / "models" / "clip_vision"
    image_encoders.mkdir(exist_ok=True)
    (image_encoders / "clip_vision_h.safetensors").touch()
    shutil.copy(VAE_FILE, base / "models" / "vae" / "wan_2.1_vae.safetensors")
    encoders = base / "models" / "text_encoders"
    encoders.mkdir(exist_ok=True)
    (encoders / "umt5_xxl_fp8_e4m3fn_scaled.safetensors").touch()  # listed, never read: the real one has 6 GB
    shutil.copy(HOST / "input" / "example.png", base / "input")
    write_published_magi(base)


def write_published_magi(base: Path) -> None:
    """As `convert` makes them of Sand AI's folders, and a video to go on from."""
    stamp = {STAMP: json.dumps({"family": "magi distilled"})}
    for name, file in (("distilled", "magi1_4.5b_distill"), ("gated", "magi1_24b_distill")):
        weights = network_of(name).state_dict() | tokens().tensors()
        save_file(weights, base / "models" / "diffusion_models" / f"{file}.safetensors", stamp)
    stamp = {magi_files.STAMP: json.dumps(VAE)}
    save_file(dict(vae_alone().state_dict()), base / "models" / "vae" / "magi1_vae.safetensors", stamp)
    (base / "models" / "text_encoders" / "t5xxl_fp16.safetensors").touch()
    frames = (255 * torch.rand(30, 48, 48, 3, generator=torch.Generator().manual_seed(0))).byte().numpy()
    save_video(frames, base / "input" / "video.mp4", 24)
