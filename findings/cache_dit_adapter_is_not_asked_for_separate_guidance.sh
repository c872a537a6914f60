#!/usr/bin/env bash
# cache-dit 1.5.3: BlockAdapter(has_separate_cfg=False) is not listened to where cache-dit knows the pipeline by name.
#
# Guessed: an adapter that says there is one forward a step counts every forward as a step. With a threshold that always
# reuses, 20 steps at guidance 1 (one forward each) compute the last block in the 4 steps of warm-up alone.
# Seen: 8 times, as when nothing is said: every second forward is taken for the negative's, with a warm-up and a cache of
# its own, so that each forward reuses what is two steps old. The same word in DBCacheConfig, enable_separate_cfg=False,
# is listened to.
#
# Seen on 2026-11-28: forwards of 20 that computed the last block
#   nothing said 8
#   BlockAdapter(has_separate_cfg=False) 8
#   DBCacheConfig(enable_separate_cfg=False) 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile cache-dit==1.5.3 diffusers==0.42.1 torch==2.13.0 \
    transformers==5.24.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | grep -v Cache-DiT
import cache_dit
import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

levels = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
asked = {
    "prompt": None, "prompt_embeds": torch.randn(1, 3, 8), "height": 64, "width": 64, "num_frames": 9,
    "num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent",
}


@torch.no_grad()
def computed(adapter, config):
    network = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=3
    ).eval()
    forwards = []
    network.blocks[-1].register_forward_hook(lambda *told: forwards.append(told))
    pipeline = SkyReelsV2Pipeline(None, None, network, None, levels)
    pipeline.set_progress_bar_config(disable=True)
    blocks = cache_dit.BlockAdapter(
        pipe=pipeline,
        transformer=network,
        blocks=network.blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        **adapter,
    )
    always = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 10.0}
    cache_dit.enable_cache(blocks, cache_config=cache_dit.DBCacheConfig(**always, **config))
    pipeline(**asked)
    return len(forwards)


print("nothing said", computed({}, {}))
print("BlockAdapter(has_separate_cfg=False)", computed({"has_separate_cfg": False}, {}))
print("DBCacheConfig(enable_separate_cfg=False)", computed({}, {"enable_separate_cfg": False}))
PYTHON
)
expected="nothing said 8
BlockAdapter(has_separate_cfg=False) 8
DBCacheConfig(enable_separate_cfg=False) 4"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
