"""A run's video as it comes: decoded chunk by chunk, written to ComfyUI's output folder, shown on the node."""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from server import PromptServer
from torch import Tensor

from ...flowcache_core.errors import UserError, first_line
from ...flowcache_core.history.offload import Movable
from ...flowcache_core.history.streams import AT_ONCE, Pending, SideStream
from ...flowcache_core.media.encoding import CODECS, QUALITIES, Encoding, Sound
from ...flowcache_core.media.picture_stream import PictureStream
from ...flowcache_core.media.pictures import filmstrip
from ...flowcache_core.media.video import frames_of
from ...flowcache_core.media.video_stream import VideoStream
from ...flowcache_core.models.latent_spaces import pixel_size
from ...flowcache_core.report import Report
from ...flowcache_core.storage.files import clean_name
from .decode import stream_decoder
from .widgets import advanced

UNNAMED = "flowcache"  # files whose prefix names none
PLAYED_FOR = 5.0  # seconds, at least, before more of an unfinished video is shown
PREVIEW_SIZE = 768  # pixels of the longer side of a chunk's preview


@dataclass(frozen=True)
class StreamSettings:
    """How a run's video is written while the run goes on.

    Attributes:
        vae: the host's, which decodes it.
        prefix: of the file name, in ComfyUI's output folder.
        fps: frames a second.
        keep_latents: whether the run also holds all latents in memory, for its output.
        node_id: of the node that shows the finished video.
        how: it is encoded.
        sound: that is written with it at the end.
    """

    vae: Any
    prefix: str
    fps: float
    keep_latents: bool
    node_id: str | None = None
    how: Encoding = Encoding()
    sound: Sound | None = None


@dataclass(frozen=True)
class OutputFile:
    """A new file in ComfyUI's output folder, as the page knows it; or a folder of pictures, without an ending."""

    name: str
    subfolder: str

    @classmethod
    def new(cls, prefix: str, size: tuple[int, int], ending: str = ".mp4") -> "OutputFile":
        """The next free number behind a prefix. The file is there from now on, so that no other run or server takes it.

        Args:
            size: width and height in pixels, which a prefix may name.
            ending: of a file; none for a folder.

        Raises:
            UserError: the prefix leads out of the output folder, or names no file that can be written.
        """
        check_prefix(prefix)
        prefix = clean_name(prefix, UNNAMED)
        root = folder_paths.get_output_directory()
        try:
            _, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, *size)
            while True:
                file = cls(f"{name}_{counter:05}_{ending}", subfolder)
                with suppress(FileExistsError):
                    if ending:
                        file.path.touch(exist_ok=False)
                    else:
                        file.path.mkdir()
                    return file
                counter += 1
        except OSError as error:
            raise UserError(
                f"Cannot write '{prefix[:80]}' in ComfyUI's output folder ({error.strerror or error}); use another "
                f"file name prefix."
            ) from error

    def drop_empty(self) -> None:
        """Takes the file away if nothing was written to it."""
        if self.path.is_dir():
            with suppress(OSError):  # it holds something
                self.path.rmdir()
        elif self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    @property
    def path(self) -> Path:
        return Path(folder_paths.get_output_directory()) / self.subfolder / self.name

    @property
    def results(self) -> list[ui.SavedResult]:
        """The file as the page finds it, or the first and the last picture."""
        if not self.path.is_dir():
            return [ui.SavedResult(self.name, self.subfolder, io.FolderType.output)]
        pictures = sorted(path.name for path in self.path.glob("*.png"))
        folder = f"{self.subfolder}/{self.name}" if self.subfolder else self.name
        ends = dict.fromkeys([*pictures[:1], *pictures[-1:]])
        return [ui.SavedResult(name, folder, io.FolderType.output) for name in ends]

    @property
    def shown(self) -> ui.PreviewVideo | ui.SavedImages:
        """A video or pictures, for the page to show."""
        return (ui.SavedImages if self.path.is_dir() else ui.PreviewVideo)(self.results)


def encoding_inputs() -> list[io.Input]:
    """Inputs of a node that writes a video; `execute` gets what they hold as `codec`, `quality` and `audio`."""
    return [
        advanced(io.Combo.Input("codec", options=list(CODECS), default=CODECS[0])),
        advanced(io.Combo.Input("quality", options=list(QUALITIES), default=QUALITIES[0])),
        io.Audio.Input("audio", optional=True),
    ]


def sound_of(audio: Mapping | None) -> Sound | None:
    """What a link of the host's type AUDIO holds: `waveform` [1, channels, samples], `sample_rate`."""
    return None if audio is None else Sound(audio["waveform"][0].float().cpu().numpy(), int(audio["sample_rate"]))


def new_stream(file: OutputFile, fps: float, metadata: Mapping, how: Encoding) -> VideoStream | PictureStream:
    """What writes frames to a file or folder."""
    return VideoStream(file.path, fps, metadata, how) if how.ending else PictureStream(file.path, metadata)


def check_prefix(prefix: str) -> None:
    """Raises UserError for a file name prefix that leads out of the output folder, as the host judges it: by its words,
    so that a link which the user has put there leads where it leads."""
    root = os.path.abspath(folder_paths.get_output_directory())
    places = (os.path.abspath(os.path.join(root, words)) for words in (prefix, clean_name(prefix, UNNAMED)))
    if "\0" in prefix or not all(Path(place).is_relative_to(root) for place in places):
        raise UserError(
            f"The file name prefix '{prefix[:80]}' leads out of ComfyUI's output folder; use a name inside it."
        )


def workflow_metadata(hidden) -> dict:
    """What the host's own save nodes write into a file; nothing where the user turned that off."""
    if args.disable_metadata:
        return {}
    prompt = {} if hidden.prompt is None else {"prompt": hidden.prompt}
    more = hidden.extra_pnginfo or {}
    try:
        if not isinstance(more, Mapping) or not all(isinstance(name, str) and name.isprintable() for name in more):
            raise TypeError("no names with values")
        json.dumps(more).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"The request's extra_pnginfo cannot be written into a file ({first_line(error)}); send names with values "
            f"that JSON can hold, or leave it out."
        ) from error
    return {**more, **prompt}


def report_metadata(report: Report) -> dict:
    """Settings and report for a file beside the workflow; nothing where the user turned that off."""
    if args.disable_metadata:
        return {}
    return {"flowcache": {name: value for name, value in report.as_dict().items() if name != "history_bytes"}}


class Outlet(ABC):
    """Takes finished chunks of one run and decodes them.

    Args:
        vae: the host's, which decodes them.
        model: the host's patcher of the model that is sampling; it is brought back to its device after a decode.
        shape: of a chunk's latent [B, C, T, H, W].
        side: decodes beside the run, where the device has room for both.
        apart: each chunk's latents are a video of their own.
    """

    def __init__(self, vae, model, shape, side: SideStream, apart: bool = False):
        if shape[0] != 1:
            raise UserError(
                f"One video is decoded while it is made, and the latents have a batch of {shape[0]}; use a batch of 1."
            )
        self.apart, self.decode = apart, stream_decoder(vae, self._make_room)
        self.movable: Callable[[], Collection[Movable]] = tuple  # histories of the run, which may leave the device
        self.vae, self.model, self.side = vae, model, side
        self._begun: list[Pending[Tensor]] = []  # frames that are being decoded

    @abstractmethod
    def _take(self, frames: Tensor) -> None:
        """Takes decoded frames, [T, H, W, 3] in [0, 1]."""

    def add(self, latent: Tensor) -> list[Tensor]:
        """Begins to decode a chunk in the network's latent space; takes and returns what is there, as `decoded`.

        What was begun before is waited for, so that no more than one chunk is under way.
        """
        decoded = self.decoded(wait=True)
        side = self.side if self._has_room(latent) else AT_ONCE
        with side.beside():
            frames = self.decode(self.model.model.process_latent_out(latent.float()), side)
        if frames is not None:
            self._begun.append(frames)
        if self.apart:
            self._begun += [rest for rest in [self.decode.finish()] if rest is not None]
            self.decode = stream_decoder(self.vae, self._make_room)
        # The VAE may have pushed the model off its device, in the middle of a run.
        comfy.model_management.load_models_gpu([self.model])
        return decoded + self.decoded()

    def decoded(self, wait: bool = False) -> list[Tensor]:
        """Takes what has been decoded; returns those frames, [T, H, W, 3] in [0, 1] a chunk.

        Args:
            wait: for all that was begun.
        """
        decoded = []
        while self._begun and (wait or self._begun[0].there):
            decoded.append(self._begun.pop(0).on_cpu())
            self._take(decoded[-1])
        return decoded

    def finish(self, report: Report) -> "OutputFile | None":
        """Decodes what still waits; gives the file that was written, if one was."""
        self.decoded(wait=True)
        rest = self.decode.finish()
        if rest is not None:
            self._take(rest.on_cpu())
        return None

    def close(self) -> None:
        """Ends what is under way, of a run that was cut off too."""
        with suppress(UserError):
            self.decoded(wait=True)
        for frames in self._begun:  # the device may not be at work on them when the host takes the VAE away
            frames.on_cpu()

    def _has_room(self, latent: Tensor) -> bool:
        """Whether a chunk can be decoded beside the run, with the model where it is."""
        if not self.side.overlaps:
            return False
        needed = self.vae.patcher.model_size() + self.vae.memory_used_decode(latent.shape, self.vae.vae_dtype)
        return comfy.model_management.get_free_memory(self.vae.device) > needed

    def _make_room(self) -> bool:
        """Takes the network off the device of the VAE, then the oldest chunks of the history; False with nothing left
        to take."""
        management, device = comfy.model_management, self.vae.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the run's own stream may still use what goes
        decoding = [loaded for loaded in management.current_loaded_models if loaded.model is self.vae.patcher]
        if management.free_memory(1e30, device, keep_loaded=decoding):
            return True
        here = [history for history in self.movable() if history.on_device]
        for history in here:
            history.move_chunk()
        return bool(here)


class FramesOutlet(Outlet):
    """Holds the frames in memory, for the node's output.

    Attributes:
        frames: [T, H, W, 3] in [0, 1], in parts as they came.
    """

    def __init__(self, vae, model, shape, side: SideStream, apart: bool = False):
        super().__init__(vae, model, shape, side, apart)
        self.frames: list[Tensor] = []

    def _take(self, frames: Tensor) -> None:
        self.frames.append(frames)


class VideoOutlet(Outlet):
    """Writes the frames to a video.

    Args:
        settings: of the stream.
        model, shape, side, apart: as for every outlet.
        metadata: of the workflow.
    """

    def __init__(self, settings: StreamSettings, model, shape, metadata: dict, side: SideStream, apart: bool = False):
        super().__init__(settings.vae, model, shape, side, apart)
        self.settings = settings
        self._shown = 0  # frames of the unfinished file that its node plays
        self._shown_at = float("-inf")
        self.file = OutputFile.new(settings.prefix, pixel_size(shape), settings.how.ending)
        self.stream = new_stream(self.file, settings.fps, metadata, settings.how)

    def finish(self, report: Report) -> OutputFile:
        super().finish(report)
        self.stream.finish(report_metadata(report), self.settings.sound)
        if self.stream.warning:
            report.notes.append(self.stream.warning)
        if self.settings.node_id is not None:
            play(self.file, self.settings.node_id)
        return self.file

    def close(self) -> None:
        """Leaves a file that plays as far as it goes."""
        super().close()
        self.stream.close()
        self.file.drop_empty()

    def _take(self, frames: Tensor) -> None:
        self.stream.write(frames_of(2 * frames.movedim(-1, 0) - 1))
        self._play_so_far()

    def _play_so_far(self) -> None:
        """Shows the finished part on the stream's node. The player begins anew each time, so only when there is twice
        as much, and at most every few seconds."""
        stream, now = self.stream, time.monotonic()
        if self.settings.node_id is None or self.settings.how.codec != "h264":  # AV1 holds its frames back
            return
        if stream.frames >= 2 * self._shown and now - self._shown_at >= PLAYED_FOR:
            self._shown, self._shown_at = stream.frames, now
            play(self.file, self.settings.node_id)


def show(frames: Tensor, tick: int, ticks: int) -> None:
    """Frames [T, H, W, 3] in [0, 1] of a finished chunk as the preview of the node that runs."""
    picture = filmstrip(frames_of(2 * frames.movedim(-1, 0) - 1))
    comfy.utils.ProgressBar(ticks).update_absolute(tick, ticks, ("JPEG", picture, PREVIEW_SIZE))


def play(file: OutputFile, node_id: str) -> None:
    """Shows a finished video on a node that is not the running one: the page keeps the chunks' previews on that."""
    server = PromptServer.instance
    where = {"node": node_id, "display_node": node_id, "prompt_id": server.last_prompt_id}
    server.send_sync("executed", {**where, "output": file.shown.as_dict()}, server.client_id)
