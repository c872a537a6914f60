#!/usr/bin/env bash
# PyAV 18.1.0: an encoder told that its video is BT.709 writes that into the file and still converts RGB by BT.601.
#
# Guessed: with codec_context.colorspace = ITU709 the encoder turns rgb24 frames into BT.709 video, as it knows both
# ends, so that red (255, 0, 0) comes back as red: stored as Y 63, Cb 102, Cr 240.
# Seen: the video says BT.709 and holds the red of BT.601, Y 81, Cb 90, Cr 240; read as the file says, by PyAV too, it is
# (255, 23, 0). Without the tag it comes back well. A way out: reformat each frame to yuv420p with
# dst_colorspace=ITU709 before it is encoded.
#
# Seen on 2026-11-27:
#   no tag: says 2, holds 81 90 240, read as 253 0 0
#   tagged ITU709: says 1, holds 81 90 240, read as 255 23 0
#   tagged and reformatted first: says 1, holds 63 102 240, read as 254 0 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

red = np.zeros((64, 64, 3), np.uint8)
red[..., 0] = 255
av.logging.set_level(None)


def shown(name, tagged, reformatted):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        if tagged:
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(red, format="rgb24")
        if reformatted:
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        frame = next(container.decode(video=0))
        planes = [plane[0] for plane in map(bytes, frame.planes)]
        read = frame.to_ndarray(format="rgb24")[32, 32]
        print(f"{name}: says {int(frame.colorspace)}, holds", *planes, end=", ")
        print("read as", *read)


shown("no tag", False, False)
shown("tagged ITU709", True, False)
shown("tagged and reformatted first", True, True)
PYTHON
)
expected="no tag: says 2, holds 81 90 240, read as 253 0 0
tagged ITU709: says 1, holds 81 90 240, read as 255 23 0
tagged and reformatted first: says 1, holds 63 102 240, read as 254 0 0"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
