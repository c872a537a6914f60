"""Stores the workflows under the version that pyproject.toml names, for the tests of later versions.

Run it at a release: python tests/host/store_release.py
"""

import shutil
import sys
from pathlib import Path

import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script has only its own folder there

from tests.helpers.host.comfy_server import PACK  # noqa: E402
from tests.helpers.host.workflows import API, GRAPHS  # noqa: E402
from tests.helpers.paths import ROOT  # noqa: E402

RELEASED = ROOT / "tests" / "host" / "released"


def main() -> None:
    version = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]["version"]
    stored = RELEASED / version
    (stored / "api").mkdir(parents=True, exist_ok=True)
    for name, file in GRAPHS.items():
        shutil.copy(file, stored / f"{name}.json")
        shutil.copy(API / f"{name}.json", stored / "api")


if __name__ == "__main__":
    main()
