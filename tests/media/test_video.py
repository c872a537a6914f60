"""Files that players can read, whole or not at all."""

import builtins
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flowcache_core.errors import UserError
from flowcache_core.media import video
from flowcache_core.storage.files import write_whole


def ramp(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """Images [T, H, W, 3] that become brighter."""
    levels = np.linspace(20, 230, frames)[:, None, None, None]
    return np.broadcast_to(levels, (frames, height, width, 3)).astype(np.uint8)


def test_pixels_to_images():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 5, 1, 1).expand(3, 5, 4, 6)
    images = video.frames_of(pixels)
    assert images.shape == (5, 4, 6, 3) and images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert (video.frames_of(pixels[None]) == images).all()
    assert video.enlarged(images, 3).shape == (5, 12, 18, 3)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_comes_back(tmp_path, size):
    path = video.save_video(ramp(9, *size), tmp_path / "new" / "clip.mp4", fps=12)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(images) == 9 and images[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert abs(np.mean(images[0]) - 20) < 6 and abs(np.mean(images[-1]) - 230) < 6


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_animation_comes_back(tmp_path, ending):
    path = video.save_video(ramp(), tmp_path / f"clip.{ending}", fps=16)
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (9, (48, 32))
        durations = []
        for frame in range(9):
            image.seek(frame)
            image.load()
            durations.append(image.info["duration"])
        assert abs(sum(durations) - 9000 / 16) < 10
        assert abs(np.asarray(image.convert("RGB")).mean() - 230) < 6


def test_nothing_half_written_is_left(tmp_path):
    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        write_whole(tmp_path / "a.mp4", fail)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_when_writing_fails(tmp_path):
    write_whole(tmp_path / "a.txt", lambda partial: partial.write_text("old"))
    with pytest.raises(UserError):
        video.save_video(ramp(), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_bad_targets_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path, words in [
        (tmp_path / "file" / "a.mp4", "choose a folder"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "a.avi", "expected a name that ends in"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            video.save_video(ramp(), path)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied.*choose a folder"):
        video.save_video(ramp(), tmp_path / "a.webp")


def test_bad_pixels_are_told():
    with pytest.raises(UserError, match="expected one clip"):
        video.frames_of(torch.zeros(2, 3, 4, 8, 8))
    with pytest.raises(UserError, match="NaN"):
        video.frames_of(torch.full((3, 1, 4, 4), float("nan")))


def test_missing_av_is_told(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UserError, match="pip install av"):
        video.save_video(ramp(), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
