#!/usr/bin/env bash
# PyAV 18.1.0: frames read as rgb24 lose 1.2 of 255 in brightness each time a video is encoded and read again.
#
# Guessed: the errors of 8 bits and halved chroma go both ways, so three rounds of lossless H.264 leave the mean of all
# samples where it was, to a tenth or two; should they not, ACCURATE_RND in the conversion to RGB mends it.
# Seen: to_ndarray(format="rgb24") darkens by 1.2 in every round, 3.5 in three; floats (gbrpf32le) rounded by numpy by
# half as much. ACCURATE_RND alone makes it worse and FULL_CHR_H_INT alone changes nothing; both together end it. Seen
# on x86-64; the conversion is FFmpeg's swscale, which has other code for other processors.
#
# Seen on 2026-11-27: change of the mean after one, two and three rounds
#   rgb24: -1.2 -2.4 -3.5
#   gbrpf32le: -0.6 -1.1 -1.6
#   rgb24, ACCURATE_RND: -1.5 -3.0 -4.4
#   rgb24, FULL_CHR_H_INT: -1.2 -2.4 -3.5
#   rgb24, both: -0.1 -0.1 -0.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np
from av.video.reformatter import Interpolation

av.logging.set_level(None)
y, x = np.mgrid[0:128, 0:192]
waves = [((x + 3 * t) / 17, (y + 2 * t) / 13, (x + y + t) / 23) for t in range(8)]
video = (128 + 80 * np.sin(np.array(waves))).round().astype(np.uint8).transpose(0, 2, 3, 1)


def encoded(frames):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    return file


def read(file, form, flags):
    with av.open(file) as container:
        frames = [frame.to_ndarray(format=form, interpolation=flags) for frame in container.decode(video=0)]
    if form == "gbrpf32le":
        return (np.array(frames) * 255).round().clip(0, 255).astype(np.uint8)
    return np.array(frames)


accurate, full = Interpolation.ACCURATE_RND, Interpolation.FULL_CHR_H_INT
for name, form, flags in (
    ("rgb24", "rgb24", None),
    ("gbrpf32le", "gbrpf32le", None),
    ("rgb24, ACCURATE_RND", "rgb24", Interpolation.BILINEAR | accurate),
    ("rgb24, FULL_CHR_H_INT", "rgb24", Interpolation.BILINEAR | full),
    ("rgb24, both", "rgb24", Interpolation.BILINEAR | accurate | full),
):
    frames, changes = video, []
    for _ in range(3):
        frames = read(encoded(frames), form, flags)
        changes.append(f"{frames.mean() - video.mean():.1f}")
    print(f"{name}:", *changes)
PYTHON
)
expected="rgb24: -1.2 -2.4 -3.5
gbrpf32le: -0.6 -1.1 -1.6
rgb24, ACCURATE_RND: -1.5 -3.0 -4.4
rgb24, FULL_CHR_H_INT: -1.2 -2.4 -3.5
rgb24, both: -0.1 -0.1 -0.2"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
