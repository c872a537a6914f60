"""A worker of FlowCache over GPUs: `gpu_worker.py HOST PACK PACKAGE [the server's arguments]`.

It imports the host's and the pack's modules under the names that they have in the server, loads the model as the server
did, and follows the server's runs. It serves no page and ends when its standard input does.
"""

import sys

del sys.path[0]  # this folder, whose `types` would be found before Python's own

import importlib  # noqa: E402
import types  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

HOST, PACK, PACKAGE = sys.argv[1:4]


def import_host() -> None:
    """Makes the host ready to be imported, told what the server was told, and the pack's modules without its nodes."""
    sys.path.insert(0, HOST)
    sys.argv = [sys.argv[0], *sys.argv[4:]]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  (as in main.py: another package's `utils` would be found later)

    for name, folder in ((PACKAGE, Path(PACK)), (f"{PACKAGE}.nodes", Path(PACK) / "nodes")):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(folder)]
    sys.modules[PACKAGE].nodes = sys.modules[f"{PACKAGE}.nodes"]  # type: ignore[attr-defined]


def main() -> None:
    """Follows the server until that ends."""
    import_host()
    crew = importlib.import_module(f"{PACKAGE}.flowcache_core.parallel.crew")
    orders = crew.Orders()
    try:
        worker = importlib.import_module(f"{PACKAGE}.nodes.comfyui.gpu_following").Worker(orders)
        orders.say("here")
        for what, *told in orders.listen():
            worker.follow(what, *told)
    except BaseException as error:
        errors: Any = importlib.import_module(f"{PACKAGE}.flowcache_core.errors")
        orders.say("failed", errors.first_line(error) or type(error).__name__)
        raise


if __name__ == "__main__":
    main()
