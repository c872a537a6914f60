"""A video written while a run goes on: whole, cut short, and killed."""

import errno
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest

from flowcache_core.errors import UserError
from flowcache_core.media.video import read_video
from flowcache_core.media.video_stream import VideoStream
from tests.helpers.paths import ROOT


def picture(number: int) -> np.ndarray:
    """A grey that tells the frame."""
    return np.full((1, 32, 48, 3), 10 * number, dtype=np.uint8)


def blank(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((frames, height, width, 3), 90, dtype=np.uint8)


def greys(path: Path) -> list[int]:
    with av.open(str(path)) as file:
        return [round(frame.to_ndarray(format="rgb24").mean() / 10) for frame in file.decode(video=0)]


def metadata(path: Path) -> dict:
    with av.open(str(path)) as file:
        return dict(file.metadata)


def test_whole_file_has_all_frames_and_both_metadata(tmp_path):
    stream = VideoStream(tmp_path / "deep" / "a.mp4", 16, {"prompt": {"1": "x"}, "note": "words"})
    for number in range(7):
        stream.write(picture(number))
    assert stream.finish({"report": {"chunks": 2}}) == tmp_path / "deep" / "a.mp4"
    assert greys(stream.path) == list(range(7))
    told = metadata(stream.path)
    assert json.loads(told["prompt"]) == {"1": "x"} and told["note"] == "words"
    assert json.loads(told["report"]) == {"chunks": 2}
    assert [file.name for file in stream.path.parent.iterdir()] == ["a.mp4"]
    with av.open(str(stream.path)) as file:
        assert file.streams.video[0].average_rate == 16 and file.streams.video[0].frames == 7


def test_a_full_disk_at_the_end_leaves_the_file_that_plays(tmp_path, monkeypatch):
    stream = VideoStream(tmp_path / "a.mp4", 16, {"note": "words"})
    for number in range(5):
        stream.write(picture(number))

    def full(sound, whole: Path) -> None:
        whole.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "_copy", full)
    assert stream.finish({"report": "lost"}) == stream.path
    assert "No space left on device" in stream.warning and "\n" not in stream.warning
    assert greys(stream.path) == list(range(5)) and metadata(stream.path)["note"] == "words"
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_unfinished_file_plays_and_knows_its_metadata(tmp_path):
    stream = VideoStream(tmp_path / "a.mp4", 16, {"prompt": {"1": "x"}})
    stream.write(np.concatenate([picture(number) for number in range(5)]))
    before = greys(stream.path)
    assert before == list(range(len(before))) and len(before) >= 4  # while it is open: all but at most the last frame
    stream.close()
    assert greys(stream.path) == list(range(5))
    assert json.loads(metadata(stream.path)["prompt"]) == {"1": "x"}


def test_file_of_a_killed_process_plays(tmp_path):
    code = (
        "import os, signal, sys, numpy as np\n"
        "from flowcache_core.media.video_stream import VideoStream\n"
        "stream = VideoStream(sys.argv[1], 16)\n"
        "for number in range(9):\n"
        "    stream.write(np.full((1, 32, 48, 3), 10 * number, dtype=np.uint8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.mp4")], cwd=ROOT, check=False)
    assert ended.returncode == -9
    left = greys(tmp_path / "a.mp4")
    assert left == list(range(len(left))) and len(left) >= 8


def test_odd_sizes_and_no_frames(tmp_path):
    stream = VideoStream(tmp_path / "a.mp4", 16)
    stream.write(np.zeros((2, 31, 33, 3), dtype=np.uint8))
    stream.finish()
    with av.open(str(stream.path)) as file:
        assert (file.streams.video[0].height, file.streams.video[0].width) == (32, 34)
    with pytest.raises(UserError, match="no frames"):
        VideoStream(tmp_path / "b.mp4", 16).finish()


def test_closing_twice_does_no_harm(tmp_path):
    stream = VideoStream(tmp_path / "a.mp4", 16)
    stream.write(picture(3))
    stream.close()
    stream.close()
    assert greys(stream.path) == [3]


def test_frames_of_another_size_are_refused(tmp_path):
    """The library would scale them without a word."""
    stream = VideoStream(tmp_path / "v.mp4", 8.0)
    stream.write(blank(2))
    with pytest.raises(UserError, match="The frames are 64x48 and the video is 48x32; bring all frames to one size"):
        stream.write(blank(2, 48, 64))
    stream.write(blank(1))
    assert read_video(stream.finish()).shape == (3, 32, 48, 3)


def test_a_stream_that_is_cut_anywhere_is_read_up_to_there(tmp_path):
    """Inside a fragment's header too, where it opens by path no more."""
    stream = VideoStream(tmp_path / "v.mp4", 8.0)
    for _ in range(4):
        stream.write(blank(1))
    stream.close()
    whole = (tmp_path / "v.mp4").read_bytes()
    fragments = [at - 4 for at in range(len(whole)) if whole[at : at + 4] == b"moof"]
    refused = 0
    for number, start in enumerate(fragments):
        for more in (4, 8, 12, 40):
            cut = tmp_path / "cut.mp4"
            cut.write_bytes(whole[: start + more])
            with suppress(av.FFmpegError), av.open(str(cut)):
                refused -= 1
            refused += 1
            if number:
                assert len(read_video(cut)) == number
            else:
                with pytest.raises(UserError, match="cut.mp4"):
                    read_video(cut)
    assert refused > 0
