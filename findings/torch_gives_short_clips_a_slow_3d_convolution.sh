#!/usr/bin/env bash
# torch 2.13.0, CPU: how a 3D convolution is computed depends on how long the clip is. Short ones, such as a chunk that is
# decoded while a video is made, get slow_conv3d, which is several times slower a frame than oneDNN's.
#
# Guessed: the kernel follows from the layer (its weights, type and stride), so a clip decoded in chunks with the last
# frames of the one before costs what it costs in one go, or a little more.
# Seen: it changes with batch x channels x frames x height (the width does not count) above 20480, and with a batch above 1.
# A Wan-layout VAE at width 12 took 24 s for 16 chunks of 3 latent frames of 8 x 8, and 10 s for the 48 frames at once (one
# thread). The same convolution as a 2D one, whose batch is the frames and whose channels are those of three frames, gets
# oneDNN at any length.
#
# Seen on 2026-11-28: frames, kernel
#   26 slow_conv3d_forward
#   27 mkldnn_convolution
#   14, eight times as wide: slow_conv3d_forward
#   14, batch of 2: mkldnn_convolution
#   14, as 2D: mkldnn_convolution
#   the same numbers: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.profiler import profile

torch.manual_seed(0)
weight = torch.randn(12, 12, 3, 3, 3)


def kernel(work):
    with torch.no_grad(), profile() as seen:
        result = work()
    names = {event.key.removeprefix("aten::") for event in seen.key_averages()}
    return result, " ".join(sorted(names & {"slow_conv3d_forward", "mkldnn_convolution"}))


def as_3d(clip):
    return F.conv3d(clip, weight, padding=(0, 1, 1))


def as_2d(clip):
    frames = clip.unfold(2, 3, 1).permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)
    return F.conv2d(frames, weight.flatten(1, 2), padding=1).unflatten(0, (len(clip), -1)).transpose(1, 2)


for frames in (26, 27):
    print(frames, kernel(lambda: as_3d(torch.randn(1, 12, frames, 64, 64)))[1])
print("14, eight times as wide:", kernel(lambda: as_3d(torch.randn(1, 12, 14, 64, 512)))[1])
print("14, batch of 2:", kernel(lambda: as_3d(torch.randn(2, 12, 14, 64, 64)))[1])
clip = torch.randn(1, 12, 14, 64, 64)
flat, name = kernel(lambda: as_2d(clip))
print("14, as 2D:", name)
print("the same numbers:", torch.allclose(flat, as_3d(clip), atol=1e-4))
PYTHON
)
expected="26 slow_conv3d_forward
27 mkldnn_convolution
14, eight times as wide: slow_conv3d_forward
14, batch of 2: mkldnn_convolution
14, as 2D: mkldnn_convolution
the same numbers: True"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
