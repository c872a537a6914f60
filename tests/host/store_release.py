"""Stores the workflows under the version that pyproject.toml names, for the tests of later versions.

Run it at a release: python tests/host/store_release.py
"""

import shutil
import sys
from pathlib import Path

import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

from tests.helpers.host.comfy_server import PACK  # noqa: E402
from tests.helpers.paths import ROOT  # noqa: E402

RELEASED = ROOT / "tests" / "host" / "released"


def main() -> None:
    version = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]["version"]
    for file in sorted((PACK / "workflows").glob("**/*.json")):
        stored = RELEASED / version / file.relative_to(PACK / "workflows")
        stored.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, stored)


if __name__ == "__main__":
    main()
