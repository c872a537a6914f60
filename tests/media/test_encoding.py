"""Codecs, qualities and sound of written videos."""

import json
import wave

import av
import numpy as np
import pytest
from PIL import Image

from flowcache_core.errors import UserError
from flowcache_core.media import encoding
from flowcache_core.media.encoding import CODECS, QUALITIES, Encoding, Sound
from flowcache_core.media.picture_stream import PictureStream
from flowcache_core.media.video import read_video
from flowcache_core.media.video_stream import VideoStream


def moving(frames: int = 16, height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth random colours that move, [T, H, W, 3]."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(small).resize((2 * width, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 2 * at : 2 * at + width] for at in range(frames)])


def tone(seconds: float, rate: int, channels: int) -> Sound:
    """440 Hz."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return Sound(np.repeat(wave[None].astype(np.float32), channels, axis=0), rate)


def written(path, how: Encoding, sound: Sound | None = None):
    stream = VideoStream(path, 8, {"note": "words"}, how)
    frames = moving()
    for part in np.split(frames, 4):
        stream.write(part)
    stream.finish({"report": {"chunks": 4}}, sound)
    assert stream.warning is None
    return frames


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "png"])
def test_each_quality_keeps_less_and_takes_less(tmp_path, codec):
    sizes, off = [], []
    for number, quality in enumerate(QUALITIES):
        path = tmp_path / f"{number}.mp4"
        frames = written(path, Encoding(codec, quality))
        with av.open(str(path)) as file:
            assert file.streams.video[0].codec_context.codec.canonical_name == codec
            assert json.loads(file.metadata["report"]) == {"chunks": 4} and file.metadata["note"] == "words"
        found = read_video(path)
        assert found.shape == frames.shape
        sizes.append(path.stat().st_size)
        off.append(np.abs(found.astype(float) - frames).mean())
    assert (
        sizes == sorted(sizes, reverse=True) and off == sorted(off) and off[0] < 6
    )  # of which colours at half the size are the most


def test_h264_is_written_as_it_always_was(tmp_path):
    assert Encoding() == Encoding("h264", "very high") and encoding.CRF["h264"][0] == 14


@pytest.mark.parametrize("rate, channels", [(48000, 2), (44100, 1), (12345, 1), (48000, 6)])
def test_sound_lies_beside_the_pictures_and_ends_with_them(tmp_path, rate, channels):
    """It is longer than the two seconds of video."""
    written(tmp_path / "a.mp4", Encoding(), tone(5.0, rate, channels))
    with av.open(str(tmp_path / "a.mp4")) as file:
        (stream,) = file.streams.audio
        assert stream.codec_context.channels == channels
        heard = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)[0]
        told = stream.codec_context.sample_rate
    assert told == (rate if rate != 12345 else 48000)
    assert abs(len(heard) / told - 2.0) < 0.1
    spectrum = np.abs(np.fft.rfft(heard[: told // 1]))
    assert abs(spectrum.argmax() - 440) <= 2
    assert len(read_video(tmp_path / "a.mp4")) == 16
    with av.open(str(tmp_path / "a.mp4")) as file:  # players read both as they come: they take turns
        kinds = [packet.stream.type for packet in file.demux() if packet.dts is not None]
    turns = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    assert turns >= 8


def test_sound_that_is_shorter_than_the_video(tmp_path):
    written(tmp_path / "a.mp4", Encoding(), tone(0.5, 48000, 2))
    assert len(read_video(tmp_path / "a.mp4")) == 16


@pytest.mark.parametrize("shape", [(3, 100), (0, 100), (100,)])
def test_sound_of_other_shapes_is_refused(shape):
    with pytest.raises(UserError, match="one, two or six channels"):
        Sound(np.zeros(shape, np.float32), 48000)


def test_pictures_lose_nothing(tmp_path):
    frames, stream = moving(), PictureStream(tmp_path / "clip", {"prompt": {"1": "x"}, "note": "words"})
    for part in np.split(frames, 4):
        stream.write(part)
    assert stream.finish({"chunks": 4}, tone(1.0, 8000, 2)) == tmp_path / "clip"
    stream.close()
    files = sorted(path.name for path in (tmp_path / "clip").iterdir())
    assert files == [f"{number:05}.png" for number in range(1, 17)] + ["report.json", "sound.wav"]
    assert all(
        np.array_equal(Image.open(tmp_path / "clip" / name), frame) for name, frame in zip(files, frames, strict=False)
    )
    first = Image.open(tmp_path / "clip" / "00001.png").text
    assert json.loads(first["prompt"]) == {"1": "x"} and first["note"] == "words"
    assert json.loads((tmp_path / "clip" / "report.json").read_text()) == {"chunks": 4}
    with wave.open(str(tmp_path / "clip" / "sound.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 8000)


def test_a_codec_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(encoding.ENCODERS, "av1", "no_such_encoder")
    with pytest.raises(UserError, match="cannot write av1"):
        VideoStream(tmp_path / "a.mp4", 8, how=Encoding("av1")).write(moving(1))
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


def test_a_video_without_frames(tmp_path):
    with pytest.raises(UserError, match="no frames"):
        PictureStream(tmp_path / "none").finish()
