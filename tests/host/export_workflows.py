"""Writes workflows/api/*.json from the graphs in workflows/, and the demos' pictures in docs/, through ComfyUI's own page.

Run it after a workflow was changed: python tests/host/export_workflows.py
"""

import json
import tempfile
from pathlib import Path

from comfy_page import DEMOS, NAMES, PACK, WORKFLOWS, ComfyPage
from comfy_server import Server
from published import write_published


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        write_published(server.base)
        try:
            with ComfyPage(server) as page:
                for name in NAMES:
                    page.load(WORKFLOWS / f"{name}.json")
                    api = json.dumps(page.to_api(), indent=2)
                    (WORKFLOWS / "api" / f"{name}.json").write_text(api + "\n")
                    if name in DEMOS:
                        page.run()
                        page.picture(PACK / "docs" / f"{name}.png")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
