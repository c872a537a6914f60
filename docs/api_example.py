"""Runs a workflow on a ComfyUI server and downloads what it saved. Only Python's standard library is needed.

python docs/api_example.py
python docs/api_example.py --caption "a green triangle" --seed 7 --server http://127.0.0.1:8188 --out videos
"""

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

WORKFLOW = Path(__file__).resolve().parents[1] / "workflows" / "api" / "demo_text_to_video.json"


def call(address: str, body: dict | None = None) -> bytes:
    """GET, or POST of a body as JSON."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": "application/json"})) as answer:
        return answer.read()


def queue(server: str, prompt: dict) -> str:
    """Queues a workflow in API form and returns its id."""
    try:
        return json.loads(call(f"{server}/prompt", {"prompt": prompt}))["prompt_id"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"The server refused the workflow: {error.read().decode()}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"No ComfyUI answers at {server}: {error.reason}") from None


def wait(server: str, prompt_id: str) -> dict:
    """Waits for the end and returns what each node gave, by node id."""
    while True:
        history = json.loads(call(f"{server}/history/{prompt_id}"))
        if prompt_id in history:
            break
        time.sleep(0.5)
    run = history[prompt_id]
    if run["status"]["status_str"] != "success":
        raise SystemExit(f"The run failed: {json.dumps(run['status']['messages'][-1])}")
    return run["outputs"]


def download(server: str, outputs: dict, folder: Path) -> list[Path]:
    """Fetches the files that were saved (previews are left out) and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for output in outputs.values():
        for item in output.get("images", []) + output.get("video", []):
            if item["type"] != "output":
                continue
            path = folder / Path(item["filename"]).name
            path.write_bytes(call(f"{server}/view?{urllib.parse.urlencode(item)}"))
            files.append(path)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="a workflow in API form")
    parser.add_argument("--caption", help="instead of the workflow's own")
    parser.add_argument("--chunks", type=int, help="length of the video, instead of the workflow's own")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the videos")
    chosen = parser.parse_args()

    prompt = json.loads(chosen.workflow.read_text())
    for node in prompt.values():
        inputs = node["inputs"]
        if chosen.caption is not None and inputs.get("caption"):  # the negative one is empty and stays so
            inputs["caption"] = chosen.caption
        if node["class_type"] == "FlowCacheAutoregressiveExtend":
            inputs["chunks"] = chosen.chunks or inputs["chunks"]
            inputs["seed"] = inputs["seed"] if chosen.seed is None else chosen.seed
    outputs = wait(chosen.server, queue(chosen.server, prompt))
    for path in download(chosen.server, outputs, chosen.out):
        print(path)


if __name__ == "__main__":
    main()
