"""One mp4 that is written while a run goes on. A file that is cut short plays up to its last whole frames."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..storage.files import write_whole
from .encoding import Encoding, Sound, encode, pyav, sound_packets, sound_stream, video_stream
from .video import opened

# Every frame is a fragment of its own behind an empty index, and goes to the disk at once.
FRAGMENTS = {"movflags": "frag_every_frame+empty_moov+default_base_moof+use_metadata_tags", "flush_packets": "1"}
METADATA = {"movflags": "use_metadata_tags+faststart"}


class VideoStream:
    """Takes frames as they come; `finish` makes an ordinary file of it, `close` leaves it as it is.

    Args:
        path: of the mp4. It is made when the first frames come.
        fps: frames a second.
        metadata: names and values, as JSON where they are no text; readable also while the file is unfinished.
        how: h264 or AV1, which holds back its last frames until the file ends.

    Raises:
        UserError: no `av` package, or a file that cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        fps: float,
        metadata: Mapping[str, object] | None = None,
        how: Encoding = Encoding(),
    ):
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1000)
        self.metadata = dict(metadata or {})
        self.how = how
        self.frames = 0
        self.warning: str | None = None
        self._size: Sequence[int] = ()  # height, width and 3
        self._stream: Any = None

    def write(self, frames: np.ndarray) -> None:
        """Appends images, uint8 [T, H, W, 3]; of odd width or height the last column or row is repeated.

        Raises:
            UserError: frames of another size than the first ones, or no space.
        """
        if self._stream is not None and frames.shape[1:] != self._size:
            (width, height), (first, second) = (size[1::-1] for size in (frames.shape[1:], self._size))
            raise UserError(
                f"The frames are {width}x{height} and the video is {first}x{second}; bring all frames to one size."
            )
        try:
            if self._stream is None:
                self._size = frames.shape[1:]
                self._open(frames.shape)
            encode(self._stream, frames)
        except OSError as error:
            raise UserError(f"Cannot write {self.path.name} ({error.strerror or error}); free some space.") from error
        self.frames += len(frames)

    def finish(self, metadata: Mapping[str, object] | None = None, sound: Sound | None = None) -> Path:
        """Ends the file, with more metadata and sound, as an ordinary mp4 whose index comes first. No frame is encoded
        again, and sound that is longer than the video is cut.

        Where that cannot be written (it needs the space once more), the file stays as it is, and `warning` says so.
        """
        if self._stream is None:
            raise UserError("The video has no frames.")
        self.close()
        self.metadata |= metadata or {}
        try:
            write_whole(self.path, partial(self._copy, sound))
        except (UserError, pyav().FFmpegError) as error:
            self.warning = (
                f"{self.path.name} plays, but has its index behind, and neither sound nor report inside: {error}"
            )
        return self.path

    def close(self) -> None:
        """Ends the file as it is, with what was written so far."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        with suppress(OSError):  # the disk may be full, and what is on it plays
            stream.container.mux(stream.encode())
            stream.container.close()

    def _open(self, shape: Sequence[int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        container = pyav().open(str(self.path), "w", format="mp4", options=FRAGMENTS)
        self._describe(container)
        self._stream = video_stream(container, self.fps, shape, self.how, live=True)

    def _copy(self, sound: Sound | None, whole: Path) -> None:
        av = pyav()
        with opened(self.path) as source, av.open(str(whole), "w", format="mp4", options=METADATA) as copy:
            self._describe(copy)
            stream = copy.add_stream_from_template(source.streams.video[0], opaque=True)
            heard = _Heard(copy, sound.cut(float(self.frames / self.fps))) if sound is not None else None
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    if heard:
                        heard.until(packet.dts * packet.time_base)
                    packet.stream = stream
                    copy.mux(packet)
            if heard:
                heard.until(None)

    def _describe(self, container) -> None:
        for name, value in self.metadata.items():
            container.metadata[name] = value if isinstance(value, str) else json.dumps(value)


class _Heard:
    """A file's sound, which goes into it in step with the pictures, as players read both."""

    def __init__(self, container, sound: Sound):
        self._stream = sound_stream(container, sound)
        self._packets = sound_packets(self._stream, sound)

    def until(self, seconds: Fraction | None) -> None:
        """Writes what is heard before a time; all that is left for None."""
        for packet in self._packets:
            self._stream.container.mux(packet)
            if seconds is not None and packet.pts is not None and packet.pts * packet.time_base > seconds:
                return
