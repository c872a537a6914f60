"""Settles on one CUDA card what counting cannot: `python3 -m flowcache_core.lab.gpu` (`make gpu`).

Is it correct there, how fast, and do planned memory and counted launches hold? Nothing is downloaded: random weights
are made on the card. It needs torch, numpy, pillow, safetensors and pytest. Parts go most important first, each with a
time of its own, so that a short loan still gives figures. Writes report.json and report.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..models.magi.config import MAGI_4_5B
from ..models.wan import WanConfig
from ..storage.files import check_writable, write_whole
from . import gpu_checks, gpu_speed
from .gpu_page import page
from .process import machine
from .real_size import Model, model_of
from .stock import time_stock

SELF_FORCING, SKYREELS, MAGI = map(model_of, ("causal", "skyreels", "magi"))
STOCK_FORWARDS = 9  # of ComfyUI, that are timed
TINY = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16)
TINY_MAGI = replace(
    MAGI_4_5B, layers=3, width=64, ffn_width=96, heads=4, kv_heads=2, head_dim=16, caption_width=16, caption_tokens=8
)
TOYS = (  # what the same script goes through on a processor, so that it cannot rot
    Model("toy causal", "causal", TINY, (64, 32), 2),
    Model("toy SkyReels-V2", "skyreels", replace(TINY, fps=True), (64, 32), 2),
    Model("toy MAGI-1", "magi", TINY_MAGI, (32, 32), 5),
)


@dataclass(frozen=True)
class Part:
    """A part of the script: its share of the whole time, and what it finds, one after another, until a time."""

    name: str
    share: float
    found: Callable[[float], Iterator[dict]]


def parts(device: torch.device, models: tuple[Model, Model, Model], toy: bool) -> list[Part]:
    """Lists the parts, most important first."""
    causal, skyreels, magi = models

    def checked(until: float) -> Iterator[dict]:
        for check in gpu_checks.checks(device, max(30.0, until - time.monotonic()), toy):
            yield from map(asdict, check())
            if time.monotonic() > until:
                return

    def timed(model: Model, until: float) -> Iterator[dict]:
        stock = time_stock(model, device, STOCK_FORWARDS)
        for timing in map(asdict, gpu_speed.timings(model, device, until)):
            yield timing | ({"stock": median(stock)} if stock and timing["setting"] == "plain, budget" else {})

    def whole(until: float) -> Iterator[dict]:
        begun = time.monotonic()
        yield gpu_speed.whole_run(skyreels, device, "balanced", begun + (until - begun) / 3)
        yield gpu_speed.whole_run(skyreels, device, "plain", until)

    return [
        Part("correct", 0.25, checked),
        Part(f"fast: {causal.name}", 0.15, partial(timed, causal)),
        Part(f"fast: {skyreels.name}", 0.2, partial(timed, skyreels)),
        Part("whole run", 0.25, whole),
        Part(f"fast: {magi.name}", 0.15, partial(timed, magi)),
    ]


def measure(device: torch.device, models: tuple[Model, Model, Model], toy: bool, minutes: float) -> dict:
    """Goes through all parts; what report.json holds. A part that fails is told, and the next one begins."""
    report: dict = {"machine": machine() | driver(device), "minutes": minutes, "toy": toy, "parts": {}}
    for part in parts(device, models, toy):
        begun = time.monotonic()
        found: list[dict] = []
        told: dict = {"found": found, "error": None}
        report["parts"][part.name] = told
        try:
            for one in part.found(begun + 60 * minutes * part.share):
                found.append(one)
                print(f"{part.name}: {one}", flush=True)
        except Exception as error:  # one part's fault shall not cost the others their time on the card
            told["error"] = f"{type(error).__name__}: {error}"
            print(f"{part.name}: {told['error']}", flush=True)
        told["seconds"] = time.monotonic() - begun
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def driver(device: torch.device) -> dict:
    """Says what the card is."""
    if device.type != "cuda":
        return {"card": None}
    card = torch.cuda.get_device_properties(device)
    return {"card": card.name, "card_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}


def main() -> int:
    """Runs the script; 1 where a check does not hold or a part has failed."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="that the whole may take (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny models on the processor: tries the script itself")
    options = parser.parse_args()
    check_writable(options.out / "report.json")
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA card is here; --toy tries the script itself on the processor")
    device = torch.device("cpu" if options.toy else "cuda:0")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    models = TOYS if options.toy else (SELF_FORCING, SKYREELS, MAGI)
    report = measure(device, models, options.toy, options.minutes)
    words = json.dumps(report, indent=1) + "\n"
    write_whole(options.out / "report.json", lambda partial: partial.write_text(words))
    write_whole(options.out / "report.md", lambda partial: partial.write_text(page(report)))
    print(page(report))
    held = all(check["holds"] for check in report["parts"]["correct"]["found"])
    return int(not held or any(part["error"] for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
