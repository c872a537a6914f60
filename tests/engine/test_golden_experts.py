"""Two experts, as FastVideo runs its Self-Forcing of Wan 2.2 A14B (tests/golden/README.md)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcache_core.engine.layers import Stack
from flowcache_core.errors import UserError
from flowcache_core.generation import Change, Result, generate
from flowcache_core.history import streams
from flowcache_core.history.cache import History
from flowcache_core.models.experts import BOUNDARY, ExpertsBackbone, expert_levels
from flowcache_core.models.families import FAMILIES
from flowcache_core.models.presets import PRESETS
from flowcache_core.models.wan import WanBackbone
from flowcache_core.settings import OFF, Compression, Drift, Fixed, HistorySettings, Settings
from flowcache_core.storage.keeping import KeptChunks
from flowcache_core.storage.run_folder import RunFolder
from flowcache_core.storage.state import load_state, save_state
from tests.helpers import golden_weights
from tests.helpers.golden_runs import frames_of, relative_error
from tests.helpers.golden_weights import SMALL
from tests.helpers.late_device import pretend_streams
from tests.helpers.place import golden

GOLDEN = golden("experts")
FRAMES = 3  # of a chunk
WINDOW = Settings(history=HistorySettings(window=6, compression=Compression("window")))


def experts(boundary: float = BOUNDARY, kind: Callable[..., ExpertsBackbone] = ExpertsBackbone) -> ExpertsBackbone:
    high, low = (WanBackbone(golden_weights.network(seed=seed)) for seed in (0, 1))
    return kind(high, low, boundary)


def run(chunks: int, backbone=None, settings: Settings = OFF, *, image: Tensor | None = None, done: int = 0, **more):
    """A run of so many chunks with the noise of the golden ones, behind a picture; `done` of them are there already."""
    if more.get("state") is None:
        more["prefix"] = frames_of("image", 1) if image is None else image
    noise = frames_of("noise", 1 + FRAMES * (done + chunks))[:, :, 1:].split(FRAMES, dim=2)

    def drawn(chunk: int, step: int | None) -> Tensor:
        return noise[chunk] if step is None else frames_of(f"renoise.{chunk}.{step}", FRAMES)

    return generate(
        backbone or experts(), more.pop("text", golden_weights.text("cond")), chunks, family_name="experts",
        settings=settings, noise=drawn, **more,
    )  # fmt: skip


RUNS = {
    "experts": dict(chunks=4),
    "experts_4_steps": dict(chunks=3, steps=4),
    "experts_boundary": dict(chunks=3, backbone=0.9),
    "experts_window": dict(chunks=5, settings=WINDOW),
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    told = RUNS[name] | {"backbone": experts(RUNS[name].get("backbone", BOUNDARY))}
    assert relative_error(run(**told).latents, GOLDEN[f"{name}.final"]) < 1e-5


def first_frame() -> Result:
    def drawn(chunk: int, step: int | None) -> Tensor:
        return frames_of("noise", 1) if step is None else frames_of(f"renoise.first.{step}", 1)

    return generate(
        experts(), golden_weights.text("cond"), 1, family_name="experts", settings=OFF, frames_per_chunk=1,
        latent_size=(4, 6), noise=drawn,
    )  # fmt: skip


def test_from_text_alone_the_first_frame_is_a_chunk_of_its_own():
    found = run(3, image=first_frame().latents).latents
    assert relative_error(found, GOLDEN["experts_text.final"]) < 1e-5


class OneHistory(ExpertsBackbone):
    """Wrong on purpose: both experts write to the same layers of history, and see what the later one wrote."""

    later: int

    def stacks(self, sigma: float, clean: bool) -> list[Stack]:
        found = [stack._replace(first=0) for stack in super().stacks(sigma, clean)]
        return found if self.later else found[::-1]


class LowHistory(OneHistory):
    later = 1


class HighHistory(OneHistory):
    later = 0


class OwnText(ExpertsBackbone):
    """Wrong on purpose: each expert reads the text through layers of its own."""

    def stacks(self, sigma: float, clean: bool) -> list[Stack]:
        return [stack._replace(backbone=ReadsItself(stack.backbone.network)) for stack in super().stacks(sigma, clean)]


class ReadsItself(WanBackbone):
    def conditioning(self, x, sigma, texts):
        return super().conditioning(x, sigma, [[self.context(one.text) for one in chunk] for chunk in texts])


@pytest.mark.parametrize("kind", [LowHistory, HighHistory, OwnText])
def test_a_run_that_mixes_up_the_experts_is_told_apart(kind):
    assert relative_error(run(4, experts(kind=kind)).latents, GOLDEN["experts.final"]) > 1e-3


@pytest.mark.parametrize("boundary", [0.7, 0.9, 0.95])
def test_a_run_with_another_boundary_is_told_apart(boundary):
    """0.9 changes experts at the same step, and leads the steps before to another level."""
    assert relative_error(run(4, experts(boundary)).latents, GOLDEN["experts.final"]) > 1e-3


@pytest.mark.parametrize("steps", [4, 8])
def test_levels_are_upstreams(steps):
    assert [1000 * level for level in expert_levels(steps)[:-1]] == pytest.approx(
        GOLDEN[f"timesteps.{steps}"].tolist(), abs=1e-3
    )


def test_a_clean_pass_is_made_by_both_and_memory_is_that_of_both():
    report = run(4).report
    assert report.clean_passes == 2 * (4 + 1) and report.forwards_executed == 4 * 8 + report.clean_passes
    assert report.forwards_total == 4 * (8 + 2)
    one = WanBackbone(golden_weights.network())
    plain = generate(one, golden_weights.text("cond"), 4, family_name="causal", settings=OFF, latent_size=(4, 6)).report
    assert report.history_bytes_planned == report.history_bytes_allocated
    assert report.history_bytes_planned / 13 == pytest.approx(2 * plain.history_bytes_planned / 12)  # frames


BUDGET = Settings(history=HistorySettings(budget=2))  # cut by what the newest chunk asks
HISTORIES = {"window": WINDOW, "budget": BUDGET}


@pytest.mark.parametrize("name", HISTORIES)
def test_in_system_memory(name):
    away = replace(HISTORIES[name].history, memory="system")
    found = run(5, settings=Settings(history=away)).latents
    assert torch.equal(found, run(5, settings=HISTORIES[name]).latents)


def test_what_comes_back_ahead_is_of_one_network_and_takes_two_layers_room(monkeypatch):
    away = Settings(history=HistorySettings(memory="system"))
    expected = run(3, settings=replace(away, overlap=False)).latents
    pretend_streams(streams, monkeypatch.setattr)
    fetch, ahead = History._fetch_after, []

    def fetched(history: History, layer: int) -> None:
        fetch(history, layer)
        ahead.append((layer, {at for at, one in enumerate(history.layers) if one.keys._ahead_tokens}))

    monkeypatch.setattr(History, "_fetch_after", fetched)
    assert torch.equal(run(3, settings=away).latents, expected)
    layers = SMALL.num_layers
    for layer, there in ahead:
        assert there <= {layer, layer // layers * layers + (layer + 1) % layers}


def test_a_history_in_8_bits_is_near():
    near = Settings(history=HistorySettings(type="int8"))
    assert 0 < relative_error(run(4, settings=near).latents, GOLDEN["experts.final"]) < 0.02


def test_half_a_video_is_the_low_noise_experts():
    video = frames_of("video", 1 + 2 * FRAMES)
    report = run(2, video=video, strength=0.5).report
    assert [len(steps) for steps in report.decisions["cond"].values()] == [4, 4] and report.clean_passes == 2 * 3


def test_both_experts_ask_before_a_cut():
    """Their queries are their own, so a cut keeps other tokens of one than of the other."""
    (kept,) = run(5, settings=BUDGET).state.histories
    high, low = kept.tokens.chunk(2)
    assert kept.queries.abs().amax(dim=(1, 2, 3, 4)).min() > 0 and not torch.equal(high, low)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("name", ["all", *HISTORIES])
def test_goes_on_from_a_state_as_if_it_had_not_stopped(cut, name, tmp_path):
    settings = HISTORIES.get(name, OFF)
    save_state(run(cut, settings=settings).state, tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    after = run(5 - cut, settings=settings, state=state, done=cut)
    assert torch.equal(after.latents, run(5, settings=settings).latents)


@pytest.mark.parametrize("name", ["all", *HISTORIES])
def test_an_interrupted_run_goes_on_with_the_same_bits(name, tmp_path):
    settings, image = HISTORIES.get(name, OFF), frames_of("image", 1)

    def folder() -> RunFolder:
        return RunFolder(tmp_path, "0" * 32, 2**30, 0, FRAMES, lead=1)

    run(3, settings=settings, keep=KeptChunks(folder()))
    after = run(2, settings=settings, state=folder().load(0, image), done=3)
    assert torch.equal(after.latents[:, :, -6:], run(5, settings=settings).latents[:, :, -6:])


def test_a_state_of_one_network_is_refused():
    one = WanBackbone(golden_weights.network())
    state = generate(one, golden_weights.text("cond"), 1, family_name="causal", latent_size=(4, 6)).state
    with pytest.raises(UserError, match="the state is of another model"):
        run(1, state=state, done=1)


@pytest.mark.parametrize("every", [Fixed([0, 2, 5]), Fixed([0])])
@pytest.mark.parametrize("held", ["output", "residual"])
def test_the_step_at_which_the_expert_changes_is_recomputed(every, held):
    reuse = every if held == "output" else Drift(1e9, 1, holds="residual")
    report = run(2, settings=Settings(reuse)).report
    recomputed = {step for step, again in enumerate(report.decisions["cond"][1]) if again}
    assert recomputed == {*(every.steps if held == "output" else [0]), 4}


def test_presets_recompute_as_the_docs_say():
    expected = {"off": 0, "high": 0, "balanced": 2, "fast": 3}
    decided = {name: run(1, settings=PRESETS[name]).report.decisions["cond"][0] for name in expected}
    assert {name: steps.count(False) for name, steps in decided.items()} == expected


def test_texts_that_change_while_it_runs():
    def steer(ahead):
        return Change(golden_weights.text("other")) if ahead.chunk == 2 and ahead.begins else None

    texts = [golden_weights.text(name) for name in ("cond", "cond", "other", "other")]
    expected = run(4, text=texts).latents
    assert torch.equal(run(4, steer=steer).latents, expected) and not torch.equal(run(4).latents, expected)


def test_what_cannot_be_run_is_refused():
    with pytest.raises(UserError, match="set attention to causal and lag to 8, the number of steps"):
        run(2, lag=4)
    with pytest.raises(UserError, match="set attention to causal"):
        run(2, seeing="joint")
    with pytest.raises(UserError, match="two networks, and one is given"):
        run(2, WanBackbone(golden_weights.network()))
    with pytest.raises(ValueError, match="expected the same"):
        ExpertsBackbone(*(WanBackbone(golden_weights.network(one)) for one in (SMALL, replace(SMALL, num_layers=2))))


def test_it_is_published_so():
    usual = FAMILIES["experts"]
    assert (usual.steps, usual.lag, usual.chunk_frames, usual.guidance, usual.boundary) == (8, 8, 3, 1.0, BOUNDARY)
    assert usual.levels(8) == expert_levels(8) and usual.size == (832, 480)
