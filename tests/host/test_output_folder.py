"""Files under the output folder, as the host's own save nodes judge their names."""

import pytest

from tests.helpers.host.graph import Graph, fails, random_network, write_network
from tests.helpers.host.videos import frames_of
from tests.host.test_extend import extend


@pytest.fixture(scope="module", autouse=True)
def files(server, tmp_path_factory):
    """A link to another disk, as people put one for their videos."""
    write_network(server.base / "models" / "diffusion_models" / "extend.safetensors", random_network())
    disk = tmp_path_factory.mktemp("another_disk")
    (server.base / "output" / "nas").symlink_to(disk, target_is_directory=True)
    return disk


def saving(graph: Graph, prefix: str) -> dict[str, str]:
    """Our nodes that save a file: the node that fails, by kind."""
    vae = graph.add("FlowCacheLoadDemoVAE"), 0
    stream = graph.add("FlowCacheStreamVideo", vae=vae, filename_prefix=prefix, fps=8.0)
    node = extend(graph, stream=(stream, 0), seed=90)
    report = graph.add("FlowCacheReport", report=(node, 2))
    images = graph.add("VAEDecode", samples=(node, 0), vae=vae), 0
    save = graph.add("FlowCacheSaveVideo", images=images, report=(node, 2), filename_prefix=prefix, fps=8.0)
    return {"stream": stream, "extend": node, "save": save, "report": report}


def test_a_link_in_it_is_followed(server, files):
    graph = Graph()
    nodes = saving(graph, "nas/x")
    state = graph.add("FlowCacheSaveState", state=(nodes["extend"], 1), filename_prefix="../nas/kept")
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    written = [server.saved(outcome, node)[0] for node in (nodes["extend"], nodes["save"], state)]
    assert all(file.exists() and file.resolve().parent == files for file in written)
    assert len(frames_of(written[0])) == len(frames_of(written[1])) == 13


def test_names_are_what_they_look_like(server):
    graph = Graph()
    node = saving(graph, "new\nline/")["stream"]
    (key,) = [key for key, each in graph.items() if each["inputs"].get("stream") == [node, 0]]
    (file,) = server.saved(server.run(graph), key)
    assert (file.parent.name, file.name) == ("new_line", "flowcache_00001_.mp4") and file.exists()


@pytest.mark.parametrize("prefix", ["../x", "nas/../../x", "/tmp/x", "nas/\0x", ".\u202e./x"])
def test_no_way_out_of_it(server, prefix):
    graph = Graph()
    assert "leads out of ComfyUI's output folder" in fails(server, graph, saving(graph, prefix)["stream"])
