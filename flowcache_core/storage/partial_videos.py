"""Videos that an interrupted run has left unfinished: noted in the run's folder, and removed when the run, resumed, has
written the whole one. Of a run that was killed nothing is noted, and its video stays."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from .files import check_regular, parse_json, read_json_text, write_whole

NOTED = "videos.json"  # in a run's folder
ENDING = ".mp4"  # nothing else is ever removed


def note(run: Path, output: Path, video: Path) -> None:
    """Notes a video that ends where its run was interrupted.

    Args:
        run: folder of the run; nothing is noted where it is missing, for nothing will be resumed then.
        output: folder that the video lies in, at any depth.
    """
    with suppress(OSError, UserError, ValueError):
        check_regular(video, follow=False)
        if video.suffix == ENDING and run.is_dir() and not run.is_symlink():
            told = {"videos": [*_noted(run), {"path": str(video.relative_to(output)), **_marks(video)}], "of": run.name}
            write_whole(run / NOTED, lambda partial: partial.write_text(json.dumps(told)))


def remove(run: Path, output: Path) -> None:
    """Removes the videos that were noted, as far as they are just what was noted: a file that was changed, replaced or
    moved stays."""
    for told in _noted(run):
        with suppress(OSError, ValueError, TypeError, KeyError):
            video = output / told["path"]
            inside = ".." not in video.parts and video.is_relative_to(output)
            check_regular(video, follow=False)
            if inside and video.suffix == ENDING and _marks(video) == {name: told[name] for name in ("size", "time")}:
                video.unlink()
    with suppress(OSError):
        (run / NOTED).unlink(missing_ok=True)


def _marks(video: Path) -> dict[str, int]:
    """What tells a file from another that has come to its name since."""
    found = video.stat(follow_symlinks=False)
    return {"size": found.st_size, "time": found.st_mtime_ns}


def _noted(run: Path) -> list[Mapping]:
    with suppress(OSError, ValueError, TypeError, KeyError):
        told = parse_json(read_json_text(run / NOTED))
        if told["of"] == run.name and not run.is_symlink():
            return [video for video in told["videos"] if isinstance(video, Mapping)]
    return []
