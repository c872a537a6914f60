"""A video as a folder of pictures, which lose nothing."""

import json
import wave
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import UserError
from ..storage.files import write_whole
from .encoding import Sound


class PictureStream:
    """Takes frames as they come, as `VideoStream` does: 00001.png and so on, each whole or not there.

    Args:
        path: of the folder.
        metadata: names and values, written into the first picture; what `finish` adds goes into report.json.

    Raises:
        UserError: a folder that cannot be written to.
    """

    warning: str | None = None

    def __init__(self, path: Path | str, metadata: Mapping[str, object] | None = None):
        self.path = Path(path)
        self.frames = 0
        self._metadata = dict(metadata or {})

    def write(self, frames: np.ndarray) -> None:
        """Appends images, uint8 [T, H, W, 3]."""
        for frame in frames:
            self.frames += 1
            write_whole(self.path / f"{self.frames:05}.png", partial(self._save, frame))

    def finish(self, metadata: Mapping[str, object] | None = None, sound: Sound | None = None) -> Path:
        """Writes what is known at the end: report.json, and sound.wav in 16 bits."""
        if not self.frames:
            raise UserError("The video has no frames.")
        if metadata:
            words = json.dumps(metadata, indent=1) + "\n"
            write_whole(self.path / "report.json", partial(Path.write_text, data=words, encoding="utf-8"))
        if sound is not None:
            write_whole(self.path / "sound.wav", partial(_save_sound, sound))
        return self.path

    def close(self) -> None:
        """Every picture is whole already."""

    def _save(self, frame: np.ndarray, path: Path) -> None:
        told = PngInfo()
        if self.frames == 1:
            for name, value in self._metadata.items():
                told.add_text(name, value if isinstance(value, str) else json.dumps(value))
        Image.fromarray(frame).save(path, format="PNG", pnginfo=told, compress_level=4)


def _save_sound(sound: Sound, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound.samples))
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes((sound.samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
