"""Times ComfyUI's own forward of a Wan network, for `flowcache_core.lab.gpu`, in the host's Python.

Reads a case from the standard input, with the device and how often; writes the seconds of each to the standard output.
"""

import json
import sys
import time

ASKED = json.load(sys.stdin)
sys.path.insert(0, sys.argv[1])

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = ASKED["device"] == "cpu"

import torch  # noqa: E402
from stock_forward import forward_of  # noqa: E402


def wait() -> None:
    if ASKED["device"] != "cpu":
        torch.cuda.synchronize()


with torch.inference_mode():
    torch.manual_seed(0)
    forward, seconds = forward_of(ASKED, ASKED["layers"], ASKED["device"]), []
    for _ in range(ASKED["times"] + 1):  # the first makes the text's keys and values
        wait()
        begun = time.perf_counter()
        forward()
        wait()
        seconds.append(time.perf_counter() - begun)
json.dump(seconds[1:], sys.stdout)
