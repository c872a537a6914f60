"""How a script of this folder begins that runs in the host's Python, as `script host pack`: import it before all else.

The host is ready to be imported, on the CPU; `of_pack` imports what belongs to the pack.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

HOST, PACK = sys.argv[1:3]
sys.path[:0] = [HOST, str(Path(PACK).parent)]
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import utils.extra_config  # noqa: E402, F401  (first, as in main.py: another package's `utils` would be found later)


def of_pack(name: str) -> ModuleType:
    """Imports a module of the pack, such as "nodes.comfyui.decode"."""
    return importlib.import_module(f"{Path(PACK).name}.{name}")
