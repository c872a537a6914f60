#!/usr/bin/env bash
# PyAV 18.1.0: a stream that is copied as it is (add_stream_from_template) must have an encoder named as its decoder is.
#
# Guessed: a template copies what a stream's header says, so that packets of any codec can be put into another file
# without being encoded again, as `ffmpeg -c copy` does; h264 works like that.
# Seen: for a video stream the decoder's own name is looked up among the encoders. AV1 is decoded by libdav1d, which
# only decodes: UnknownCodecError, although nothing is to be encoded, and although this build encodes AV1 itself
# (libsvtav1). A way out: opaque=True, the default for streams of other kinds.
#
# Seen on 2026-11-27:
#   h264: decoded by h264, template ok, opaque template ok
#   av1: decoded by libdav1d, template UnknownCodecError, opaque template ok
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import io

import av
import numpy as np


def file_of(encoder):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(8):
            grey = np.full((96, 128, 3), 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return file


def copied(file, **how):
    file.seek(0)
    with av.open(file) as source, av.open(io.BytesIO(), "w", format="mp4") as copy:
        (video,) = source.streams.video
        try:
            stream = copy.add_stream_from_template(video, **how)
        except av.error.FFmpegError as error:
            return type(error).__name__
        except ValueError as error:
            return type(error).__name__
        packets = [packet for packet in source.demux(video) if packet.dts is not None]
        for packet in packets:
            packet.stream = stream
            copy.mux(packet)
        return "ok" if len(packets) == 8 else f"{len(packets)} packets"


for name, encoder in (("h264", "libx264"), ("av1", "libsvtav1")):
    file = file_of(encoder)
    with av.open(io.BytesIO(file.getvalue())) as container:
        decoder = container.streams.video[0].codec_context.codec.name
    print(f"{name}: decoded by {decoder}, template {copied(file)}, opaque template {copied(file, opaque=True)}")
PYTHON
)
expected="h264: decoded by h264, template ok, opaque template ok
av1: decoded by libdav1d, template UnknownCodecError, opaque template ok"
echo "$seen"
[ "$seen" = "$expected" ] || { echo "what was expected: $expected"; exit 1; }
