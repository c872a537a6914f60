"""Writes what is made of the graphs in workflows/, through ComfyUI's own page: workflows/api/*.json, thumbnails
workflows/*.jpg for the template browser, and the pictures in docs/ of those that can run here.

Run it after a workflow was changed: python tests/host/export_workflows.py [API names]
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

from tests.helpers.host import thumbnails  # noqa: E402
from tests.helpers.host.comfy_page import ComfyPage  # noqa: E402
from tests.helpers.host.comfy_server import PACK, Server  # noqa: E402
from tests.helpers.host.published import write_published  # noqa: E402
from tests.helpers.host.videos import frames_of  # noqa: E402
from tests.helpers.host.workflows import API, DEMO, GRAPHS, MODEL  # noqa: E402


def export(page: ComfyPage, name: str) -> None:
    workflow = GRAPHS[name]
    page.load(workflow)
    prompt = page.to_api()
    (API / f"{name}.json").write_text(json.dumps(prompt, indent=2) + "\n")
    if workflow.stem.startswith(DEMO):
        page.start()
        if "FlowCacheLivePrompt" in {node["class_type"] for node in prompt.values()}:
            page.steer(9, "a magenta triangle")
            page.steer(19, "a white triangle")
        page.finish()
        page.picture(PACK / "docs" / f"{name}.png")
        videos = [frames_of(path) for path in page.saved_videos()]
        thumbnails.write(thumbnails.of_videos(videos), workflow)
    else:
        told = {node["inputs"]["family"] for node in prompt.values() if "family" in node["inputs"]} - {"auto"}
        family = told.pop() if told else ("causal" if "causal" in name else name.split("_")[0])
        presets = [node["inputs"]["preset"] for node in prompt.values() if node["class_type"] == "FlowCache"]
        thumbnails.write(thumbnails.of_family(family, workflow.stem.removeprefix(MODEL), *presets), workflow)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        write_published(server.base)
        try:
            with ComfyPage(server) as page:
                for name in sys.argv[1:] or GRAPHS:
                    export(page, name)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
