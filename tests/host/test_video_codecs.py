"""What a video is written as: codec, quality, pictures, sound; changing them samples nothing anew."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.host.graph import Graph, random_network, write_network
from tests.helpers.host.videos import frames_of
from tests.host.test_extend import extend
from tests.host.test_native import guider_calls


@pytest.fixture(scope="module", autouse=True)
def files(server):
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())


def run(server, **stream) -> tuple:
    """Guider calls that it took, and the files that the stream's node shows."""
    graph = Graph()
    vae, sound = (
        (graph.add("FlowCacheLoadDemoVAE"), 0),
        (graph.add("EmptyAudio", duration=9.0, sample_rate=44100, channels=2), 0),
    )
    settings = dict(filename_prefix="codecs/a", fps=8.0, audio=sound) | stream
    written = graph.add("FlowCacheStreamVideo", vae=vae, **settings)
    node = extend(graph, stream=(written, 0), seed=80, chunks=2)
    before = guider_calls(server)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    return guider_calls(server) - before, server.saved(outcome, node), graph


def test_another_codec_writes_the_same_run_anew(server):
    calls, (video,), graph = run(server)
    frames = frames_of(video)
    with av.open(str(video)) as file:
        assert file.streams.video[0].codec_context.codec.canonical_name == "h264"
        (sound,) = file.streams.audio
        assert abs(float(sound.duration * sound.time_base) - len(frames) / 8) < 0.2
    assert calls > 0

    none, (smaller,), _ = run(server, codec="av1", quality="small file")
    with av.open(str(smaller)) as file:
        assert file.streams.video[0].codec_context.codec.canonical_name == "av1" and len(file.streams.audio) == 1
        assert "flowcache" in file.metadata
    assert none == 0 and smaller.stat().st_size < video.stat().st_size and len(frames_of(smaller)) == len(frames)

    none, (first, last), _ = run(server, codec="png")
    pictures = sorted(first.parent.glob("*.png"))
    assert none == 0 and [pictures[0], pictures[-1]] == [first, last] and len(pictures) == len(frames)
    exact = np.stack([np.asarray(Image.open(path)) for path in pictures]).astype(float)
    assert np.abs(exact - frames).mean() < 5  # random pixels, of which mp4 keeps half the colours
    assert json.loads(Image.open(first).text["prompt"])["1"] == graph["1"]
    assert json.loads((first.parent / "report.json").read_text())["flowcache"]["chunks"] == 2
    assert (first.parent / "sound.wav").stat().st_size > 1000


def test_frames_are_saved_as_pictures_beside_earlier_ones(server):
    folders = []
    for _ in range(2):
        graph = Graph()
        images = graph.add("EmptyImage", width=32, height=32, batch_size=3, color=len(folders))
        saved = dict(filename_prefix="codecs/b", fps=8.0, codec="png")
        node = graph.add("FlowCacheSaveVideo", images=(images, 0), **saved)
        outcome = server.run(graph)
        assert outcome.error is None, outcome.error["exception_message"]
        first, last = server.saved(outcome, node)
        assert (first.name, last.name) == ("00001.png", "00003.png")
        folders.append(first.parent)
    assert folders[0] != folders[1] and folders[0].parent == folders[1].parent


def test_the_demos_decoder_is_not_told_to_lack_its_weights(server):
    before = server.log.read_text().count("No VAE weights")  # of other tests on the same server
    run(server, filename_prefix="codecs/log")
    assert server.log.read_text().count("No VAE weights") == before
