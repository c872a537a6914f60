"""The bench's report.json, to which each of its commands adds its part."""

import json
from pathlib import Path

from ..storage.files import write_whole

NAME = "report.json"


def add_to_report(out: Path, name: str, part: dict) -> None:
    """Puts a part into the report of a folder, under a name and in place of an earlier one; makes what is missing."""
    path = out / NAME
    report = json.loads(path.read_text()) if path.exists() else {}
    words = json.dumps(report | {name: part}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(words))
