#!/usr/bin/env bash
# diffusers 0.42.1: the SkyReels-V2 diffusion-forcing pipeline documents `latents`, and fails with any that it is given.
#
# Guessed: latents [1, 16, frames, height / 8, width / 8] are the noise that a video begins with, as in other pipelines,
# so the same ones give the same video whatever the generator.
# Seen: without them it runs. With them it raises "not enough values to unpack": they come back from prepare_latents
# alone, where the caller takes four values. Text-to-video, SkyReelsV2Pipeline, takes the same latents. A way out: put a
# prepare_latents on the pipeline that returns (latents, their frames, None, 0).
#
# Seen on 2026-11-28:
#   diffusion forcing without latents (1, 16, 3, 8, 8)
#   diffusion forcing with latents ValueError: not enough values to unpack (expected 4, got 1)
#   text to video with latents (1, 16, 3, 8, 8)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

torch.manual_seed(0)
network = SkyReelsV2Transformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1
)
levels = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
asked = {
    "prompt": None, "prompt_embeds": torch.randn(1, 3, 8), "height": 64, "width": 64, "num_frames": 9,
    "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "return_dict": False,
}
latents = torch.randn(1, 16, 3, 8, 8)
forcing = SkyReelsV2DiffusionForcingPipeline(None, None, network, None, levels)
text_to_video = SkyReelsV2Pipeline(None, None, network, None, levels)
runs = {
    "diffusion forcing without latents": (forcing, {}),
    "diffusion forcing with latents": (forcing, {"latents": latents}),
    "text to video with latents": (text_to_video, {"latents": latents}),
}
for name, (pipeline, more) in runs.items():
    pipeline.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            print(name, tuple(pipeline(**asked, **more)[0].shape))
    except ValueError as error:
        print(f"{name} ValueError: {error}")
PYTHON
)
expected="diffusion forcing without latents (1, 16, 3, 8, 8)
diffusion forcing with latents ValueError: not enough values to unpack (expected 4, got 1)
text to video with latents (1, 16, 3, 8, 8)"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
