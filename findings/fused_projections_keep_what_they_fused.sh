#!/usr/bin/env bash
# diffusers 0.42.1: fuse_qkv_projections() adds the fused layers to the separate ones, and save_pretrained saves both.
#
# Guessed: fusing puts one layer in the place of query's, key's and value's, so a model has as many parameters before,
# while fused, in the file saved then, and after unfuse_qkv_projections().
# Seen: the separate layers stay, unused, so that the model and its file grow. WanTransformer3DModel loses the fused
# ones when it is unfused; UNet2DConditionModel keeps them, and would save them, for good.
# And what is done to a fused layer's weights is not in the separate ones: unfused, the model is as it was before that.
#
# Seen on 2026-11-27: parameters before, fused, in the file, unfused
#   WanTransformer3DModel 11592 14592 14592 11592
#   UNet2DConditionModel 51364 53348 53348 53348
#   output changed by doubling the fused weights: True; still changed once unfused: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile diffusers==0.42.1 torch==2.13.0 safetensors==0.8.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import sys

import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import load_file

torch.manual_seed(0)
wan = WanTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=8,
    ffn_dim=8,
    num_layers=1,
).eval()
unet = UNet2DConditionModel(
    block_out_channels=(8, 16),
    layers_per_block=1,
    sample_size=8,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def size(tensors):
    return sum(tensor.numel() for tensor in tensors)


for model in (wan, unet):
    sizes = [size(model.parameters())]
    model.fuse_qkv_projections()
    sizes.append(size(model.parameters()))
    model.save_pretrained(sys.argv[1])
    sizes.append(size(load_file(sys.argv[1] + "/diffusion_pytorch_model.safetensors").values()))
    model.unfuse_qkv_projections()
    sizes.append(size(model.parameters()))
    print(type(model).__name__, *sizes)


@torch.no_grad()
def output():
    return wan(latents, torch.tensor([500]), text, return_dict=False)[0]


latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 8)
before = output()
wan.fuse_qkv_projections()
for name, weights in wan.named_parameters():
    if "to_qkv" in name or "to_kv" in name:
        weights.data *= 2
fused = output()
wan.unfuse_qkv_projections()
changed = [not torch.allclose(before, after, atol=1e-5) for after in (fused, output())]
print("output changed by doubling the fused weights: {}; still changed once unfused: {}".format(*changed))
PYTHON
)
expected="WanTransformer3DModel 11592 14592 14592 11592
UNet2DConditionModel 51364 53348 53348 53348
output changed by doubling the fused weights: True; still changed once unfused: False"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
