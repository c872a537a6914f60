"""ComfyUI's own forward of the same networks, and its VAE, counted in a process of the host's, where there is one."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..models.wan import WanConfig
from .meter import Work, in_layers
from .real_size import TEXT_TOKENS, Model

HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
SCRIPT = Path(__file__).parents[2] / "tests" / "host" / "count_stock.py"


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
        Nothing where there is no ComfyUI with a Python of its own; MAGI-1, which it cannot run, is left out.
    """
    python = HOST / ".venv" / "bin" / "python"
    asked = [model for model in models if isinstance(model.config, WanConfig)]
    if not python.exists() or not SCRIPT.exists() or not asked:
        return {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cases = json.dumps([_case(model) for model in asked])
    ran = subprocess.run(
        [python, SCRIPT, HOST], input=cases, capture_output=True, text=True, env=environment, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"ComfyUI's forward at {HOST} could not be counted:\n{ran.stderr[-2000:]}")
    answers = json.loads(ran.stdout)
    return {
        model: Stock(in_layers(Work.from_list(one), Work.from_list(two), model.layers), Work.from_list(decode))
        for model, (one, two), decode in zip(asked, answers["forwards"], answers["decodes"], strict=True)
    }


def _case(model: Model) -> dict:
    config = model.config
    assert isinstance(config, WanConfig)
    return {
        "config": {"dim": config.dim, "ffn_dim": config.ffn_dim, "num_heads": config.num_heads},
        "shape": [2 if model.family.guidance != 1.0 else 1, *model.shape[1:]],
        "causal": model.family_name == "causal",
        "past": model.budget,
        "text_tokens": TEXT_TOKENS,
    }
