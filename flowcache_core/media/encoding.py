"""How frames and sound become a file: the codec, how much of the picture it keeps, and what its colours mean.

Players take the colours of HD video as BT.709's and those of smaller ones as BT.601's, so that is what is written, and
the file says so too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from ..errors import UserError

HD = 720  # rows of pixels from which on a video is HD
BT709, BT601, UNSAID = 1, 6, 2  # how files name what their colours mean (H.273)
MATRIX = {BT709: 1, BT601: 5}  # the same for what converts pixels
BROADCAST = 1  # of a file's range: 16 to 235
# Of what converts pixels: bicubic, every pixel's own chroma, exact rounding. As it goes by itself, reading darkens by
# more than 1 of 255.
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000
Codec = Literal["h264", "av1", "png"]
Quality = Literal["very high", "high", "medium", "small file"]
CODECS: tuple[Codec, ...] = get_args(Codec)
QUALITIES: tuple[Quality, ...] = get_args(Quality)
CRF: dict[Codec, tuple[int, ...]] = {"h264": (14, 18, 23, 28), "av1": (18, 25, 32, 40)}  # by quality
ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}  # by the number of channels
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


@dataclass(frozen=True)
class Encoding:
    """How frames are written.

    Attributes:
        codec: of an mp4; "png" for a folder of pictures, which lose nothing.
        quality: what of the picture is kept; pictures keep all.
    """

    codec: Codec = "h264"
    quality: Quality = "very high"

    @property
    def ending(self) -> str:
        """Of the file's name; none for a folder."""
        return "" if self.codec == "png" else ".mp4"


@dataclass(frozen=True)
class Sound:
    """What is heard.

    Attributes:
        samples: float32 [channels, samples] in [-1, 1]; one, two or six channels (5.1).
        rate: samples a second.
    """

    samples: np.ndarray
    rate: int

    def __post_init__(self):
        if self.samples.ndim != 2 or self.samples.shape[0] not in LAYOUTS or self.rate <= 0:
            raise UserError(
                f"The sound has shape {list(self.samples.shape)} at {self.rate} samples a second; give one, two or six "
                "channels."
            )

    def cut(self, seconds: float) -> "Sound":
        """The sound's beginning."""
        return Sound(self.samples[:, : round(seconds * self.rate)], self.rate)


def pyav():
    """Imports PyAV, which takes long and is not always needed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "Writing mp4 needs the package 'av': pip install av, or choose a name that ends in .webp."
        ) from error
    return av


def colours_of(height: int) -> int:
    """Says what the colours of a video mean that says nothing of them."""
    return BT709 if height >= HD else BT601


def video_stream(container, fps: Fraction, shape: Sequence[int], how: Encoding = Encoding(), live: bool = False):
    """Adds a video stream to a file that PyAV writes, for images of a shape [T, H, W, 3].

    Args:
        live: frames go out as soon as they come in, as far as the codec can.

    Raises:
        UserError: this PyAV cannot write the codec.
    """
    if ENCODERS[how.codec] not in pyav().codecs_available:
        raise UserError(f"This PyAV cannot write {how.codec}; choose another codec.")
    stream = container.add_stream(ENCODERS[how.codec], rate=fps)
    stream.height, stream.width = (side + side % 2 for side in shape[1:3])  # yuv420p halves both
    stream.pix_fmt = "yuv420p"
    told = stream.codec_context
    told.colorspace = told.color_primaries = told.color_trc = colours_of(stream.height)
    told.color_range = BROADCAST
    options = {"crf": str(CRF[how.codec][QUALITIES.index(how.quality)])}
    if how.codec == "av1":
        options |= {"preset": "8"} | ({"svtav1-params": "pred-struct=1"} if live else {})
    elif live:
        options |= {"tune": "zerolatency"}
    stream.options = options
    return stream


def encode(stream, frames: np.ndarray) -> None:
    """Appends images, uint8 [T, H, W, 3]; of odd width or height the last column or row is repeated."""
    av, matrix = pyav(), MATRIX[colours_of(stream.height)]
    for image in np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge"):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=matrix, interpolation=EXACT)
        stream.container.mux(stream.encode(picture))


def sound_stream(container, sound: Sound):
    """Adds a stream of AAC to a file that PyAV writes."""
    rate = sound.rate if sound.rate in AAC_RATES else 48000
    return container.add_stream("aac", rate=rate, layout=LAYOUTS[len(sound.samples)])


def sound_packets(stream, sound: Sound) -> Iterator[Any]:
    """Encodes a sound, piece by piece."""
    av = pyav()
    told = stream.codec_context
    into = av.AudioResampler(format=told.format, layout=told.layout, rate=told.sample_rate)
    for begin in range(0, sound.samples.shape[1], sound.rate):
        piece = np.ascontiguousarray(sound.samples[:, begin : begin + sound.rate], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=LAYOUTS[len(piece)])
        frame.sample_rate, frame.pts, frame.time_base = sound.rate, begin, Fraction(1, sound.rate)
        for ready in into.resample(frame):
            yield from stream.encode(ready)
    for ready in into.resample(None):
        yield from stream.encode(ready)
    yield from stream.encode(None)
