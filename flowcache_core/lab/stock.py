"""ComfyUI's own forward of the same networks, and its VAE, counted or timed in a process of the host's, where there is
one."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints import CAUSAL_FAMILIES
from ..models.wan import WanConfig
from .meter import Work, in_layers
from .real_size import TEXT_TOKENS, Model

HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
SCRIPTS = Path(__file__).parents[2] / "tests" / "host"


class Stock(NamedTuple):
    """What the host's own code does with a chunk.

    Attributes:
        forward: with all branches of guidance; attention over the history is left out.
        decode: of its Wan VAE, in the middle of a video.
    """

    forward: Work
    decode: Work


def count_stock(models: Sequence[Model]) -> dict[Model, Stock]:
    """Counts the host's forward and its decode of one chunk.

    Returns:
        Nothing where there is no ComfyUI with a Python of its own; MAGI-1 and LongVie, which it cannot run, are left
        out. Of two networks it is one.
    """
    asked = [model for model in models if isinstance(model.config, WanConfig) and not model.led]
    answers = _ran("count_stock.py", [_case(model) for model in asked]) if asked else None
    if answers is None:
        return {}
    return {
        model: Stock(in_layers(Work.from_list(one), Work.from_list(two), model.layers), Work.from_list(decode))
        for model, (one, two), decode in zip(asked, answers["forwards"], answers["decodes"], strict=True)
    }


def time_stock(model: Model, device: torch.device, times: int) -> list[float] | None:
    """Times the host's forward of one chunk behind as many as the model's budget holds.

    Returns:
        Seconds of each; None where there is no ComfyUI, or where its forward is another one: it runs a causal network
        alone over a history, as a plain run of ours does.
    """
    if model.family_name != "causal" or not isinstance(model.config, WanConfig):
        return None
    asked = {"device": device.type, "times": times, "layers": model.layers}
    return _ran("time_stock.py", _case(model) | asked)


def _ran(script: str, asked: object) -> Any:
    """What a script in the host's Python answers; None where there is no host. It may have no Python of its own."""
    path, own = SCRIPTS / script, HOST / ".venv" / "bin" / "python"
    if not (HOST / "comfy").is_dir() or not path.exists():
        return None
    ran = subprocess.run(
        [own if own.exists() else sys.executable, path, HOST],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ran.returncode:
        raise RuntimeError(f"{script} could not be run with the ComfyUI at {HOST}:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout)


def _case(model: Model) -> dict:
    config = model.config
    assert isinstance(config, WanConfig)
    return {
        "config": {
            "dim": config.dim,
            "ffn_dim": config.ffn_dim,
            "num_heads": config.num_heads,
            "text_dim": config.text_dim,
            "in_dim": config.in_dim,
            "out_dim": config.out_dim,
        },
        "shape": [2 if model.family.guidance != 1.0 else 1, *model.shape[1:]],
        "causal": model.family_name in CAUSAL_FAMILIES,
        "past": model.budget,
        "text_tokens": TEXT_TOKENS,
    }
