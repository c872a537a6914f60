"""Helios' transformer against the diffusers library's (tests/golden/README.md), and what docs/helios.md counts."""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from flowcache_core.engine.forward import Step
from flowcache_core.engine.layers import run_layers
from flowcache_core.errors import UserError
from flowcache_core.history.positions import rotate
from flowcache_core.models import helios
from flowcache_core.models.helios import COARSENESS, HeliosBackbone, HeliosConfig, Parts, Places, table
from flowcache_core.models.presets import PRESETS
from flowcache_core.models.rotary import Rotary
from flowcache_core.schedule import ChunkSchedule, Place
from flowcache_core.solvers.multistep import UniPC
from tests.helpers import golden_weights
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_weights import normal
from tests.helpers.place import DEVICE, golden

GOLDEN = golden("helios")
SIGMA = 0.75
BOUND = 1e-5
UNEVEN = Places(range(1, 7), range(7, 10), (0, 10), range(11, 14))
RUNS = {  # places, latent size of the history's frames and of the chunk's, texts
    "published": (Places(), (8, 12), (8, 12), ["cond"]),
    "stage": (Places(), (8, 12), (4, 6), ["cond"]),
    "uneven": (UNEVEN, (6, 10), (6, 10), ["cond", "uncond"]),
    "short": (UNEVEN._replace(long=(), mid=()), (6, 10), (6, 10), ["cond"]),
    "without": (Places((), (), (), range(3)), (6, 10), (6, 10), ["cond"]),
    "amplified": (UNEVEN, (6, 10), (6, 10), ["cond"]),
}
SEEN = [(name, part) for name in RUNS for part in COARSENESS if len(getattr(RUNS[name][0], part))]


@cache
def backbone(amplified: bool) -> HeliosBackbone:
    config = HeliosConfig(dim=96, ffn_dim=128, num_heads=3, num_layers=3, text_dim=24, amplified=amplified)
    network = config.network().to(DEVICE)
    golden_weights.fill(network)
    return HeliosBackbone(network.eval().requires_grad_(False))


def latents(name: str, frames: int, size: tuple[int, int]) -> Tensor:
    return normal(name, (1, 16, frames, *size))


def velocity(
    name: str, runs: HeliosBackbone | None = None, left_out: str = "", told: Callable[[Places], Places] = lambda x: x
) -> Tensor:
    """A run's velocity, by the layers of `run_layers`; without a part of the history, or told other places."""
    (places, size, own_size, texts), runs = RUNS[name], runs or backbone(name == "amplified")
    if left_out:
        places = places._replace(**{left_out: ()})
    parts = {part: latents(f"history.{part}", len(getattr(places, part)), size) for part in COARSENESS}
    runs.show(Parts(**{part: shown if shown.shape[2] else None for part, shown in parts.items()}))
    turns = table(runs.rotary, told(places), runs.grid(*size), runs.grid(*own_size)).to(DEVICE)

    def attend(layer: int, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return runs.attention(rotate(q, turns), rotate(k, turns), v)

    x = latents("noise", len(places.own), own_size).expand(len(texts), -1, -1, -1, -1)
    contexts = [runs.context(golden_weights.text(text)) for text in texts]
    (group,) = run_layers(runs, [Step(x, SIGMA, Place(0, 0, 0))], lambda step: contexts, 1, [], attend)
    return runs.head(x, group.levels, runs.residual(x, group.hidden))


def missed(name: str, **wrong) -> bool:
    """Whether what is wrong shows, by far."""
    return relative_error(velocity(name, **wrong), GOLDEN[name]) > 100 * BOUND


@pytest.mark.parametrize("name", RUNS)
def test_one_forward(name):
    assert relative_error(velocity(name), GOLDEN[name]) < BOUND


@pytest.mark.parametrize(("name", "part"), SEEN)
def test_a_missing_resolution_shows(name, part):
    assert missed(name, left_out=part)


@pytest.mark.parametrize(("name", "part"), [*SEEN, ("published", "own"), ("stage", "own")])
def test_a_wrong_place_shows(name, part):
    def told(right: Places) -> Places:
        return right._replace(**{part: [place + 1 for place in getattr(right, part)]})

    assert missed(name, told=told)


def test_coarse_tokens_stand_at_the_mean_turn_of_their_places(monkeypatch):
    monkeypatch.setattr(helios, "coarse", lambda axis, times: axis[:, ::times])
    assert missed("published") and missed("uneven")


class AsNoisy(HeliosBackbone):
    """Wrong on purpose: the history is told the chunk's noise level."""

    def conditioning(self, x, sigma, texts):
        right = super().conditioning(x, sigma, texts)
        return right._replace(modulation=right.modulation[:, 1:].expand(-1, 2, -1, -1))


class Unscaled(HeliosBackbone):
    """Wrong on purpose: the history's keys are not scaled."""

    def _key_scale(self, block):
        return torch.ones(())


@pytest.mark.parametrize(("wrong", "name"), [(AsNoisy, "published"), (AsNoisy, "short"), (Unscaled, "amplified")])
def test_what_the_history_is_told_shows(wrong, name):
    assert missed(name, runs=wrong(backbone(name == "amplified").network))


def test_chunks_go_through_one_by_one():
    runs, x = backbone(False), latents("noise", 6, (6, 10))
    with pytest.raises(UserError, match=r"\[1, 6\], expected one for each row"):
        runs.conditioning(x, torch.full((1, 6), SIGMA), [])


def test_its_scheduler_without_stages_is_our_unipc():
    expected, x = GOLDEN["latents"], normal("x", (1, 2, 3, 4, 4))
    solver = UniPC(GOLDEN["levels"].tolist())
    for step, after in enumerate(expected):
        x = solver.step(x, normal(f"velocity{step}", tuple(x.shape)) + 0.3 * x, step)
        assert relative_error(x, after) < BOUND


DIM, FFN, TEXT = 5120, 13824, 512  # of the published network
STAGES = ((12, 20), (24, 40), (48, 80))  # latent sizes of 640x384 and of its two coarser stages


def tokens(own_size: Sequence[int]) -> tuple[int, int]:
    """Those of the history and of the chunk, in the published layout at 640x384."""
    grid, own_grid = (24, 40), (own_size[0] // 2, own_size[1] // 2)
    everything, own = table(Rotary(128), Places(), grid, own_grid).shape[1], 9 * own_grid[0] * own_grid[1]
    return everything - own, own


def products(history: int, own: int, seen: int) -> int:
    """Multiplications of a layer for so many tokens, each of which attends to `seen` ones."""
    each = 4 * DIM**2 + 2 * DIM * FFN + 2 * DIM * seen
    return (history + own) * each + own * (2 * DIM**2 + 2 * DIM * TEXT)


def test_the_tokens_that_the_study_counts():
    assert [tokens(size) for size in STAGES] == [(2400, 540), (2400, 2160), (2400, 8640)]


def test_the_work_that_the_study_counts():
    pairs = [tokens(size) for size in STAGES]
    whole = [products(history, own, history + own) for history, own in pairs]
    alone = [products(0, own, own) for _, own in pairs]
    beside = [products(0, own, history + own) for history, own in pairs]  # the history's keys and values are there
    assert [round(100 * (1 - part / of)) for part, of in zip(alone, whole, strict=True)] == [80, 52, 24]
    assert [round(100 * (1 - part / of)) for part, of in zip(beside, whole, strict=True)] == [79, 48, 19]
    once = products(2400, 0, 2400)  # for which the history is run alone, once a chunk
    assert round(100 * (1 - (2 * sum(beside) + once) / (2 * sum(whole)))) == 28  # 2 steps a stage
    assert round(100 * (1 - (20 * sum(beside) + once) / (20 * sum(whole)))) == 32  # 20
    assert round(100 * (1 - (50 * beside[-1] + once) / (50 * whole[-1]))) == 19  # 50, without stages


def test_the_parameters_that_the_study_counts():
    with torch.device("meta"):
        network = HeliosConfig(DIM, FFN, num_heads=40, num_layers=40).network()
    patches = [getattr(network, f"patch_{part}") for part in COARSENESS]
    assert round(sum(each.numel() for each in network.parameters()) / 1e9, 1) == 14.3
    assert round(sum(each.numel() for patch in patches for each in patch.parameters()) / 1e6) == 24


def test_the_steps_that_the_study_counts():
    schedule = ChunkSchedule(2, 50, 50)
    policies = [PRESETS[name].reuse.policy(schedule) for name in ("high", "balanced", "fast")]
    assert [len(policy.recomputed(50)) for policy in policies] == [16, 9, 6]
