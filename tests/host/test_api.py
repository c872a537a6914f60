"""The example of headless use, run as its page says, and the page's own code."""

import ast
import json
import re
import subprocess
import sys
import time
import urllib.request

from tests.helpers.host.comfy_server import PACK
from tests.helpers.host.videos import check_video, frames_of

PAGE = (PACK / "docs" / "api.md").read_text(encoding="utf-8")


def test_example_downloads_a_video(server, tmp_path):
    command = [
        sys.executable,
        PACK / "docs" / "api_example.py",
        "--server",
        server.address,
        "--out",
        tmp_path / "videos",
    ]
    said = subprocess.run(
        [*command, "--caption", "a green triangle", "--chunks", "2", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    (path,) = (tmp_path / "videos").iterdir()
    assert said.stdout.split() == [str(path)]
    check_video(path, 2 * 12 - 3, 256)


def test_example_says_why_a_server_refuses(server, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"1": {"class_type": "FlowCacheReport", "inputs": {"report": ["2", 0]}}}))
    command = [sys.executable, PACK / "docs" / "api_example.py", "--server", server.address, "--workflow", broken]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        said.returncode == 1
        and said.stderr.startswith("The server refused the workflow: ")
        and "Traceback" not in said.stderr
    )


def test_graph_of_the_page_runs(server):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    prompt = re.search(r"prompt = (\{.*?\n\})", code, re.DOTALL)[1]
    outcome = server.run(ast.literal_eval(prompt))
    assert outcome.error is None
    (path,) = server.saved(outcome, "9")
    assert frames_of(path).shape == (4 * 12 - 3, 64, 64, 3)


def until(true, seconds: float = 60.0) -> None:
    """Asks again and again until the answer is yes."""
    asked = 0.0
    while not true():
        time.sleep(0.05)
        asked += 0.05
        assert asked < seconds, "it never came to be"


def test_curl_lines_name_what_the_server_has(server):
    """The addresses of the page answer: the queued run, its history, its file, and the interrupt."""
    body = json.dumps({"prompt": json.loads((PACK / "workflows/api/demo_text_to_video.json").read_text())})
    assert re.search(r"/prompt -H .Content-Type: application/json. ", PAGE)
    prompt_id = server.post("/prompt", json.loads(body))["prompt_id"]
    until(lambda: prompt_id in json.dumps(server.get("/queue")["queue_running"]))
    server.post("/interrupt", {})
    until(lambda: prompt_id in server.get(f"/history/{prompt_id}"))
    with urllib.request.urlopen(f"{server.address}/queue") as answer:
        assert prompt_id not in answer.read().decode()
