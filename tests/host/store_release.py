"""Stores the workflows under the version that pyproject.toml names, for the tests of later versions.

Run it at a release: python tests/host/store_release.py
"""

import shutil
from pathlib import Path

import tomllib
from comfy_server import PACK

RELEASED = Path(__file__).parent / "released"


def main() -> None:
    version = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]["version"]
    for file in sorted((PACK / "workflows").glob("**/*.json")):
        stored = RELEASED / version / file.relative_to(PACK / "workflows")
        stored.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, stored)


if __name__ == "__main__":
    main()
