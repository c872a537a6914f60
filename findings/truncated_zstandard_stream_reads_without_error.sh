#!/usr/bin/env bash
# zstandard 0.25.0: its streaming readers end a file that was cut short as if it were whole; gzip, bz2 and xz raise.
#
# Guessed: zstandard.open(file, "rb").read() fails on half a file as gzip.open(file).read() does, with EOFError or
# ZstdError, as each frame's last block is marked and zstandard's own decompress() raises.
# Seen: open, stream_reader, read_to_iter and copy_stream give the complete blocks before the cut, and no error; the
# frame's header states the size of all of it, here 953751 bytes, yet it is not compared. A way out: feed a
# decompressobj() and ask for its eof at the end.
#
# Seen on 2026-11-27:
#   gzip EOFError
#   bz2 EOFError
#   xz EOFError
#   zstandard decompress ZstdError
#   zstandard open 393216 of 953751 bytes
#   zstandard stream_reader 393216 of 953751 bytes
#   zstandard read_to_iter 393216 of 953751 bytes
#   zstandard copy_stream 393216 of 953751 bytes
#   size in the header of the half: 953751
#   decompressobj's eof after the half: False, after the whole: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zstandard==0.25.0
seen=$("$folder/venv/bin/python" - <<'PYTHON'
import bz2
import gzip
import io
import lzma

import zstandard

data = "".join(str(i * i) for i in range(100000)).encode()
whole = zstandard.ZstdCompressor().compress(data)
half = whole[: len(whole) // 2]


def cut(compressed):
    return io.BytesIO(compressed[: len(compressed) // 2])


def copied(source):
    target = io.BytesIO()
    zstandard.ZstdDecompressor().copy_stream(source, target)
    return target.getvalue()


readers = {
    "gzip": lambda: gzip.open(cut(gzip.compress(data))).read(),
    "bz2": lambda: bz2.open(cut(bz2.compress(data))).read(),
    "xz": lambda: lzma.open(cut(lzma.compress(data))).read(),
    "zstandard decompress": lambda: zstandard.decompress(half),
    "zstandard open": lambda: zstandard.open(cut(whole), "rb").read(),
    "zstandard stream_reader": lambda: zstandard.ZstdDecompressor().stream_reader(cut(whole)).read(),
    "zstandard read_to_iter": lambda: b"".join(zstandard.ZstdDecompressor().read_to_iter(cut(whole))),
    "zstandard copy_stream": lambda: copied(cut(whole)),
}
for name, read in readers.items():
    try:
        part = read()
        assert data.startswith(part)
        print(name, len(part), "of", len(data), "bytes")
    except (EOFError, zstandard.ZstdError) as error:
        print(name, type(error).__name__)
print("size in the header of the half:", zstandard.frame_content_size(half))
ends = []
for compressed in (half, whole):
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    decompressor.decompress(compressed)
    ends.append(decompressor.eof)
print("decompressobj's eof after the half: {}, after the whole: {}".format(*ends))
PYTHON
)
expected="gzip EOFError
bz2 EOFError
xz EOFError
zstandard decompress ZstdError
zstandard open 393216 of 953751 bytes
zstandard stream_reader 393216 of 953751 bytes
zstandard read_to_iter 393216 of 953751 bytes
zstandard copy_stream 393216 of 953751 bytes
size in the header of the half: 953751
decompressobj's eof after the half: False, after the whole: True"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
