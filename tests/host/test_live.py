"""Live Prompt over the API: a run is steered, stopped, resumed; another with what it showed has the same bits."""

import json
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.storage.state import load_state
from tests.helpers.host.comfy_server import PACK, Refused
from tests.helpers.host.graph import Graph, fails, random_network, sample, write_network
from tests.helpers.host.magi_models import write_network as write_magi
from tests.host.test_extend import extend, flowcache
from tests.host.test_magi import extend as extend_magi
from tests.host.test_magi import load as load_magi

PAGE = (PACK / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def networks(server):
    models = server.base / "models" / "diffusion_models"
    write_network(models / "extend.safetensors", random_network())
    write_magi("base", models / "magi_base")


def one_by_one(graph: Graph, positive: str, **more) -> str:
    """With steps enough for a caption to come in time on a fast machine."""
    model = flowcache(graph, preset="high", history_budget=2)
    node = extend(graph, model=model, **dict(chunks=5, steps=40, lag=40) | more)
    graph[node]["inputs"]["positive"] = [positive, 0]
    return node


def several(graph: Graph, positive: str) -> str:
    """Behind a chunk and a frame that are given."""
    given = graph.add("EmptyARVideoLatent", width=64, height=64, length=9, batch_size=1)
    return one_by_one(graph, positive, steps=30, lag=10, guidance=3.0, prefix=(given, 0))


def magi(graph: Graph, positive: str) -> str:
    return extend_magi(graph, load_magi(graph), positive=(positive, 0), chunks=5, steps=16)


def live(graph: Graph, text: str = "a red circle", **more) -> str:
    return graph.add("FlowCacheLivePrompt", text=text, **{"blend": 0} | more)


def steering(server, *told: tuple[int, dict]):
    """For `Server.run`: posts bodies, each once, when a chunk of that number begins; and the answers."""
    waiting, answers = list(told), []

    def on_event(kind: str, data: dict) -> None:
        if kind == "flowcache.live" and waiting and f"chunk {waiting[0][0]} of" in data["said"]:
            where = {"prompt_id": data["prompt_id"], "node_id": data["node"]}
            answers.append(server.post("/flowcache/live", where | waiting.pop(0)[1])["said"])

    return on_event, answers


@pytest.mark.parametrize(("make", "encoder"), [(one_by_one, ""), (several, ""), (magi, "TestBrittleT5")])
def test_a_second_run_with_the_captions_of_the_first_has_the_same_bits(server, make, encoder):
    graph = Graph()
    clip = {"clip": (graph.add(encoder), 0)} if encoder else {}
    node = make(graph, live(graph, blend=1, **clip))
    saves = [graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")]
    saves += [graph.add("FlowCacheSaveState", state=(node, 1), filename_prefix="s")]
    shown, report = graph.add("PreviewAny", source=(node, 3)), graph.add("FlowCacheReport", report=(node, 2))
    told = [(1, {"text": "boom"}), (3, {"text": "a blue\nsquare"})] if encoder else [(1, {"text": "a blue\nsquare"})]
    on_event, answers = steering(server, *told)
    outcome = server.run(graph, on_event=on_event)
    assert outcome.error is None, outcome.error["exception_message"]
    latent, state = (server.saved(outcome, save)[0] for save in saves)
    (text,) = outcome.outputs[shown]["text"]
    assert text.splitlines()[1].endswith(": a red circle *0.5 | a blue square *0.5")
    assert text.splitlines()[2].endswith("-: a blue square") and len(answers) == len(told)
    assert load_state(state).prompts == json.loads(outcome.outputs[report]["report"][0])["prompts"] == text
    said = outcome.outputs[report]["text"][0]
    assert "captions that changed while it ran: 1, encoded in " in said
    assert ("a caption was not taken: out of luck" in said) == bool(encoder)  # the run went on with the one before
    assert node not in server.run(graph).executed  # what was made is kept to be worked with

    again = Graph()
    clip = {"clip": (again.add("TestSmallT5"), 0)} if encoder else {}
    expected = sample(server, again, make(again, again.add("FlowCachePromptsOverTime", text=text, **clip)))
    assert torch.equal(load_file(latent)["latent_tensor"], expected)


def test_a_video_that_goes_on_says_what_all_of_it_shows(server):
    graph = Graph()
    begun = one_by_one(graph, live(graph, "a  white\ncircle"), seed=95, steps=4, lag=4)
    node = one_by_one(graph, live(graph, "a cyan square"), seed=95, steps=4, lag=4, state=(begun, 1))
    shown = graph.add("PreviewAny", source=(node, 3))
    outcome = server.run(graph)
    assert outcome.error is None, outcome.error["exception_message"]
    assert outcome.outputs[shown]["text"] == ["0-4: a white circle\n5-: a cyan square"]


def test_a_stopped_run_is_a_shorter_one_and_goes_on_where_it_is_kept(server):
    graph = Graph()
    resume, vae = graph.add("FlowCacheResume", limit_gb=1.0), graph.add("FlowCacheLoadDemoVAE")
    stream = graph.add("FlowCacheStreamVideo", vae=(vae, 0), filename_prefix="live/v", fps=8.0)
    node = one_by_one(graph, live(graph), seed=91, steps=30, lag=10, stream=(stream, 0), resume=(resume, 0))
    save = graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    report = graph.add("FlowCacheReport", report=(node, 2))
    on_event, answers = steering(server, (2, {"stop": True, "text": "a blue square"}))
    outcome = server.run(graph, on_event=on_event)
    assert outcome.error is None and "the run ends with the chunk that is finished next" in answers[0]
    frames = load_file(server.saved(outcome, save)[0])["latent_tensor"].shape[2]
    assert 2 <= frames < 10
    assert f"stopped after {frames // 2} of 5 chunks" in outcome.outputs[report]["text"][0]
    # Nothing of the graph has changed, and yet it is not what the host takes from its cache.
    outcome = server.run(graph)
    assert f"{frames // 2} chunks were there" in outcome.outputs[report]["text"][0]
    assert load_file(server.saved(outcome, save)[0])["latent_tensor"].shape[2] == 10
    told = json.loads(outcome.outputs[report]["report"][0])["prompts"]
    assert told.startswith("0-") and told.endswith("-: a blue square")
    assert node not in server.run(graph).executed  # this one was told nothing


def test_runs_of_a_queue_have_their_own_captions_and_an_interrupted_one_goes_on_with_them(server):
    def queued(seed: int) -> tuple[Graph, str, str]:
        graph = Graph()
        resume = (graph.add("FlowCacheResume", limit_gb=1.0), 0)
        node = one_by_one(graph, live(graph), seed=seed, resume=resume)
        return (
            graph,
            graph.add("SaveLatent", samples=(node, 0), filename_prefix="s"),
            graph.add("PreviewAny", source=(node, 3)),
        )

    first, save, shown = queued(92)
    second, _, shown_second = queued(93)
    behind, refused = [], []
    steer, _ = steering(server, (2, {"text": "a blue square"}))

    def on_event(kind: str, data: dict) -> None:
        if kind == "flowcache.live" and "chunk 1 of" in data["said"]:
            behind.append(server.post("/prompt", {"prompt": second, "client_id": "other"})["prompt_id"])
            with pytest.raises(Refused) as refusal:
                server.post(
                    "/flowcache/live", {"prompt_id": behind[0], "node_id": data["node"], "text": "a cyan square"}
                )
            refused.append(str(refusal.value))
        steer(kind, data)
        if kind == "flowcache.live" and "chunk 4 of" in data["said"]:
            server.post("/interrupt", {})

    assert server.run(first, on_event=on_event).interrupted and "No such run is on" in refused[0]
    outcome = server.run(first)  # behind the second
    (theirs,) = server.get(f"/history/{behind[0]}")[behind[0]]["outputs"][shown_second]["text"]
    assert theirs == "0-: a red circle"
    (text,) = outcome.outputs[shown]["text"]
    assert text in ("0-1: a red circle\n2-: a blue square", "0-2: a red circle\n3-: a blue square")
    again = Graph()
    expected = sample(server, again, one_by_one(again, again.add("FlowCachePromptsOverTime", text=text), seed=92))
    assert torch.equal(load_file(server.saved(outcome, save)[0])["latent_tensor"], expected)


def asked(server, body: bytes, kind: str = "application/json", method: str = "POST") -> tuple[int, str]:
    request = urllib.request.Request(server.address + "/flowcache/live", body, {"Content-Type": kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)["said"]
    except urllib.error.HTTPError as error:
        told = error.read().decode()
        return error.code, json.loads(told)["error"] if told.startswith("{") else told


def test_what_is_asked_wrongly_is_told_and_does_nothing(server):
    for name in ("`prompt_id`", "`node_id`", "`text`", "`blend`", "`stop`", "400", "404", "409", "413", "415"):
        assert name in PAGE
    names = {"prompt_id": "x", "node_id": "1"}
    assert asked(server, json.dumps(names | {"text": "a red circle"}).encode())[0] == 404
    assert asked(server, json.dumps(names | {"text": "x" * 70000}).encode())[0] == 413
    assert asked(server, b'{"prompt_id": "x"}', "text/plain")[0] == 415
    assert asked(server, b"", method="GET")[0] in (404, 405)
    for body in (
        b"", b"\xff", b"[" * 30000, b"[]", b'{"text": "a"}', b'{"prompt_id": 1, "node_id": "1", "text": "a"}',
        json.dumps(names).encode(), json.dumps(names | {"stop": False}).encode(),
        json.dumps(names | {"text": "a", "blend": -1}).encode(),
        json.dumps(names | {"text": "a", "path": "/"}).encode(),
    ):  # fmt: skip
        status, said = asked(server, body)
        assert status == 400 and said.endswith(".") and "\n" not in said, body


def test_a_caption_that_cannot_be_shown_costs_nothing(server):
    """Words that the encoder does not know are told at once, and that no chunk is left."""
    graph = Graph()
    node = one_by_one(graph, live(graph), seed=94)
    graph.add("SaveLatent", samples=(node, 0), filename_prefix="s")
    said = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "flowcache.live" and "chunk 1 of" in data["said"]:
            names = {"prompt_id": data["prompt_id"], "node_id": data["node"]}
            for text in ("a purple circle", "{a|b}", "a \\| b"):
                said.append(asked(server, json.dumps(names | {"text": text}).encode()))
        if kind == "flowcache.live" and "chunk 5 of" in data["said"]:
            names = {"prompt_id": data["prompt_id"], "node_id": data["node"]}
            said.append(asked(server, json.dumps(names | {"text": "a blue square"}).encode()))

    assert server.run(graph, on_event=on_event).error is None
    assert [status for status, _ in said] == [400] * 3 + [409] and "does not know the word 'purple'" in said[0][1]


def test_where_it_cannot_work_is_told(server):
    graph = Graph()
    node = one_by_one(graph, live(graph), attention="joint")
    assert "needs chunks one after another" in fails(server, graph, node)
    graph = Graph()
    node = one_by_one(graph, live(graph))
    graph[node]["inputs"]["negative"] = [live(graph, ""), 0]
    assert "connect it there" in fails(server, graph, node)
    graph = Graph()
    changed = graph.add("ConditioningZeroOut", conditioning=(live(graph), 0))
    assert "straight to Autoregressive Extend" in fails(server, graph, one_by_one(graph, changed))
