"""What an interrupted run left of its video goes when the whole one is there, and nothing else does."""

import json

import pytest

from flowcache_core.storage import partial_videos


@pytest.fixture
def places(tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    (output / "long").mkdir(parents=True)
    run.mkdir()
    return run, output


def written(output, name: str):
    video = output / "long" / name
    video.write_bytes(name.encode())
    return video


def test_all_that_were_noted_go(places):
    run, output = places
    videos = [written(output, name) for name in ("a_1.mp4", "a_2.mp4")]
    for video in videos:
        partial_videos.note(run, output, video)
    other = written(output, "a_3.mp4")
    partial_videos.remove(run, output)
    assert not any(video.exists() for video in videos) and other.exists() and not list(run.iterdir())


@pytest.mark.parametrize("how", ["longer", "of another time", "a link"])
def test_what_took_its_name_since_stays(places, how):
    run, output = places
    video = written(output, "a_1.mp4")
    partial_videos.note(run, output, video)
    if how == "longer":
        video.write_bytes(b"another one")
    else:
        video.rename(output / "kept.mp4")
        if how == "a link":
            video.symlink_to(output / "kept.mp4")
        else:
            written(output, "a_1.mp4")
            video.touch()
    partial_videos.remove(run, output)
    assert video.exists()


@pytest.mark.parametrize("path", ["../outside.mp4", "/{folder}/outside.mp4", "long/notes.txt"])
def test_no_other_file_goes(places, path):
    run, output = places
    path = path.format(folder=output.parent)
    (output / path).write_bytes(b"x")
    stat = (output / path).stat()
    told = [{"path": path, "size": stat.st_size, "time": stat.st_mtime_ns}]
    (run / partial_videos.NOTED).write_text(json.dumps({"videos": told, "of": run.name}))
    partial_videos.remove(run, output)
    assert (output / path).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"of": "run"}', '{"of": "run", "videos": [1, {"path": 2}, {}]}'])
def test_a_damaged_note_is_none(places, text):
    run, output = places
    (run / partial_videos.NOTED).write_text(text)
    partial_videos.remove(run, output)
    assert not list(run.iterdir())


def test_nothing_is_noted_without_a_run(places):
    run, output = places
    run.rmdir()
    partial_videos.note(run, output, written(output, "a_1.mp4"))
    assert not run.exists()
