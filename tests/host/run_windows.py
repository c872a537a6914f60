"""Runs in the host's Python: `run_windows.py host pack` asks the adapter about paths of Windows.

Prints, as JSON, which file name prefixes it takes, and which folders of models it lists.
"""

import json
import ntpath
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from in_host import of_pack

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))

import folder_paths  # isort: skip
from windows import DrivePath

folders, stream = of_pack("nodes.comfyui.folders"), of_pack("nodes.comfyui.stream")
errors = of_pack("flowcache_core.errors")
PREFIXES = (
    "FlowCache", "video\\FlowCache", "video/FlowCache", "a\\..\\b", "C:\\ComfyUI\\output\\a",
    "..\\a", "a\\..\\..\\a", "C:\\Windows\\a", "D:a", "D:\\a", "\\a", "\\\\host\\share\\a", "c:..\\a", "a/../../b",
)  # fmt: skip


def taken(prefix: str) -> bool:
    try:
        stream.check_prefix(prefix)
    except errors.UserError:
        return False
    return True


folder_paths.get_output_directory = lambda: "C:\\ComfyUI\\output"
stream.Path = folders.Path = DrivePath
stream.os = SimpleNamespace(path=ntpath)
with tempfile.TemporaryDirectory() as base:
    for name in ("sky/model.safetensors.index.json", "sky/inner/part.safetensors", "loras/plain.safetensors"):
        (Path(base) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(base) / name).touch()
    listed = ["sky\\model.safetensors.index.json", "sky\\inner\\part.safetensors", "loras\\plain.safetensors"]
    folder_paths.get_filename_list = lambda folder: listed
    folder_paths.get_folder_paths = lambda folder: [f"C:{base}".replace("/", "\\")]
    whole = folders.model_folders("diffusion_models")
    found = DrivePath(folders.file_path("diffusion_models", "sky")).here == Path(base) / "sky"
print(
    "RESULT " + json.dumps({"prefixes": {prefix: taken(prefix) for prefix in PREFIXES}, "whole": whole, "found": found})
)
