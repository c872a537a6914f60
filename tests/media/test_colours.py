"""Colours of saved videos: what players take them for, what they say of themselves, and what comes back."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from flowcache_core.errors import UserError
from flowcache_core.media.encoding import BROADCAST, BT601, BT709, video_stream
from flowcache_core.media.video import frame_rate, read_video, save_video
from flowcache_core.media.video_stream import VideoStream

SIZES = [(720, 1280, BT709), (722, 404, BT709), (480, 832, BT601)]


def picture(height: int, width: int, frames: int = 2) -> np.ndarray:
    """Smooth random colours, [T, H, W, 3]."""
    small = np.random.default_rng(0).integers(0, 256, (frames, height // 16, width // 16, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in small]
    )


def save(frames: np.ndarray, path, way: str):
    if way == "whole":
        return save_video(frames, path)
    stream = VideoStream(path, 16.0)
    stream.write(frames)
    return stream.finish() if way == "stream" else stream.close() or path


@pytest.mark.parametrize("way", ["whole", "stream", "unfinished"])
@pytest.mark.parametrize("height, width, colours", SIZES)
def test_pixels_and_tags_are_those_of_the_size(tmp_path, height, width, colours, way):
    """Pure red, by the standards' own numbers for Y, Cb and Cr."""
    red = np.broadcast_to(np.array([255, 0, 0], dtype=np.uint8), (2, height, width, 3))
    path = save(red, tmp_path / "red.mp4", way)
    with av.open(str(path)) as file:
        told = file.streams.video[0].codec_context
        assert (told.colorspace, told.color_primaries, told.color_trc) == (colours,) * 3
        assert told.color_range == BROADCAST
        frame = next(file.decode(video=0))
        found = [np.frombuffer(bytes(plane), np.uint8)[0] for plane in frame.planes]
    expected = (63, 102, 240) if colours == BT709 else (81, 90, 240)
    assert np.abs(np.array(found, dtype=int) - expected).max() <= 1
    assert np.abs(read_video(path)[0, 9, 9].astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("height, width, colours", SIZES)
def test_three_rounds_of_saving_and_reading_do_not_drift(tmp_path, height, width, colours):
    first = now = picture(height, width)
    for round in range(3):
        now = read_video(save(now, tmp_path / f"{round}.mp4", "stream"))
    drift = np.abs((now.astype(float) - first).mean(axis=(0, 1, 2)))
    assert drift.max() <= 0.5, drift
    with av.open(str(tmp_path / "0.mp4")) as file:  # as it goes by itself, one reading loses more
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert np.abs((plain.astype(float) - first).mean(axis=(0, 1, 2))).max() > drift.max()


@pytest.mark.parametrize("height, width, colours", [(736, 64, BT709), (64, 64, BT601)])
def test_a_file_without_tags_is_read_by_its_size(tmp_path, height, width, colours):
    path = tmp_path / "untold.mp4"
    with av.open(str(path), "w") as container:
        stream = video_stream(container, Fraction(8), (1, height, width, 3))
        told = stream.codec_context
        told.colorspace = told.color_primaries = told.color_trc = 2
        red = av.VideoFrame.from_ndarray(np.full((height, width, 3), (255, 0, 0), dtype=np.uint8), format="rgb24")
        red = red.reformat(format="yuv420p", dst_colorspace=1 if colours == BT709 else 5)
        container.mux(stream.encode(red))
        container.mux(stream.encode())
    assert np.abs(read_video(path)[0, 9, 9].astype(int) - (255, 0, 0)).max() <= 3


def test_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="text.mp4 cannot be read as a video"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(UserError, match="gone.mp4"):
        read_video(tmp_path / "gone.mp4")


def test_a_part_and_a_turned_video(tmp_path):
    """By the file's own words: seconds from its start, and the matrix with which phones say how they were held."""
    frames = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 64 * 64 * 3).reshape(24, 64, 64, 3).copy()
    frames[:, :8] = 255  # the edge that is up
    path = save_video(frames, tmp_path / "part.mp4", fps=8)
    part = read_video(path, start=1.0, duration=0.5)
    assert len(part) == 4 and np.abs(part[:, 32, 32, 0].astype(int) - (80, 90, 100, 110)).max() <= 2
    assert len(read_video(path)) == 24 and frame_rate(path) == 8
    with path.open("rb") as file:
        assert np.array_equal(read_video(file, 1.0, 0.5), part)
    with pytest.raises(UserError, match="from second 9"):
        read_video(path, start=9.0)

    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of a track header's version 0
    assert data[matrix : matrix + 4] == (1 << 16).to_bytes(4, "big")
    clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in clockwise)
    path.write_bytes(data)
    turned = read_video(path)
    assert turned[0, :, 60].mean() > 200 > 50 > turned[0, 4, :50].mean()
