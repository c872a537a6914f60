"""A video keeps its colours when it is saved, read and saved again, as a continued video is."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.host.graph import Graph
from tests.helpers.host.videos import frames_of


def first_frames(server) -> str:
    """Smooth random colours as a picture in the host's input folder."""
    small = np.random.default_rng(0).integers(20, 236, (30, 52, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((832, 480), Image.Resampling.BICUBIC)
    (server.base / "input").mkdir(exist_ok=True)
    picture.save(server.base / "input" / "colours.png")
    return "colours.png"


def saved(server, graph: Graph, images, prefix: str):
    """The file that Save Video with Report writes, brought into the input folder."""
    node = graph.add("FlowCacheSaveVideo", images=images, filename_prefix=prefix, fps=8.0)
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    (file,) = server.saved(outcome, node)
    shutil.copy(file, server.base / "input" / f"{prefix}.mp4")
    return outcome, file


def drift(server, reader: str) -> float:
    """How far, of 255, a colour's mean is off after three rounds."""
    graph = Graph()
    image = graph.add("LoadImage", image=first_frames(server))
    images = graph.add("RepeatImageBatch", image=(image, 0), amount=2), 0
    _, file = saved(server, graph, images, f"{reader}0")
    for round in range(1, 3):
        graph = Graph()
        video = graph.add("LoadVideo", file=f"{reader}{round - 1}.mp4")
        _, file = saved(server, graph, (graph.add(reader, video=(video, 0)), 0), f"{reader}{round}")
    first = np.asarray(Image.open(server.base / "input" / "colours.png"), dtype=float)
    return np.abs(frames_of(file).mean(axis=(0, 1, 2)) - first.mean(axis=(0, 1))).max()


def test_three_rounds_keep_the_brightness(server):
    ours = drift(server, "FlowCacheReadVideo")
    assert ours <= 0.5
    assert drift(server, "GetVideoComponents") > 0.5  # else this node is not needed any more


def test_compare_measures_what_stands_in_the_file(server):
    """Against the frames that were saved: what is left is the encoder's loss."""
    graph = Graph()
    image = graph.add("LoadImage", image=first_frames(server))
    images = graph.add("RepeatImageBatch", image=(image, 0), amount=2), 0
    _, file = saved(server, graph, images, "compared")
    video = graph.add("LoadVideo", file="compared.mp4")
    read = graph.add("FlowCacheReadVideo", video=(video, 0))
    node = graph.add("FlowCacheCompareVideos", first=images, second=(read, 0), view="wipe")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    first = np.asarray(Image.open(server.base / "input" / "colours.png"), dtype=float)
    off = ((frames_of(file) - first) ** 2).mean(axis=(1, 2, 3))
    psnr = (10 * np.log10(255**2 / off)).mean()
    assert float(outcome.outputs[node]["text"][0].split()[1]) == pytest.approx(psnr, abs=0.06)


def test_rate_trim_and_frames_that_were_never_encoded(server):
    graph = Graph()
    colours = [(graph.add("EmptyImage", width=64, height=64, batch_size=8, color=c), 0) for c in (0xFF0000, 0x0000FF)]
    images = graph.add("ImageBatch", image1=colours[0], image2=colours[1]), 0
    saved(server, graph, images, "trimmed")

    graph = Graph()
    video = graph.add("LoadVideo", file="trimmed.mp4"), 0
    if "Video Slice" in server.get("/object_info"):  # not on ComfyUI 0.3.64
        video = graph.add("Video Slice", video=video, start_time=1.0, duration=0.5, strict_duration=False), 0
    read = graph.add("FlowCacheReadVideo", video=video)
    made = graph.add("CreateVideo", images=(read, 0), fps=(read, 1))
    again = graph.add("FlowCacheReadVideo", video=(made, 0))
    _, file = saved(server, graph, (again, 0), "again")
    frames = frames_of(file)
    if len(frames) == 16:
        frames = frames[8:12]
    assert len(frames) == 4 and np.abs(frames[:, 32, 32].astype(int) - (0, 0, 255)).max() <= 3
